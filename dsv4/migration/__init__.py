"""Migration of programs from DeepSeek's V3 API to V4: changes to source files, and costs of their past usage."""
