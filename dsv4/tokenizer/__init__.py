"""Tokenizer: text and conversations to token ids, and token ids to text."""

from dsv4.tokenizer.tokenizer import DecodeStream, Tokenizer, TokenizerMissingError

__all__ = ["DecodeStream", "Tokenizer", "TokenizerMissingError"]
