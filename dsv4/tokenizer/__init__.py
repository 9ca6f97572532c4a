"""Text and conversations to token ids, and back."""

from dsv4.tokenizer.tokenizer import DecodeStream, Tokenizer, TokenizerMissingError

__all__ = ["DecodeStream", "Tokenizer", "TokenizerMissingError"]
