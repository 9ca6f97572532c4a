"""Conversations: a conversation in, tokens to the engine, events out.

deepseek-recipe validates requests, renders prompts and parses what the model writes; this package carries tokens
between it and the engine, and puts malformed tool calls into the form that it parses.
"""
