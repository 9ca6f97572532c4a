"""Conversations over the engine: requests to prompt tokens, output tokens to chunks of a wire format.

deepseek-recipe validates requests, renders prompts and parses the model's output; this package passes tokens between
deepseek-recipe and the engine, and rewrites malformed tool calls into the form that deepseek-recipe parses.
"""
