"""Domains of specialists: problems of mathematics, code, instructions and tools, each a pure function of its number."""
