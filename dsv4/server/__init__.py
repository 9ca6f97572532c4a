"""The HTTP server: DeepSeek's Chat Completions and Messages APIs over one engine, and the chat page."""
