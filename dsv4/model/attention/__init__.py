"""V4 attention: a 128-token window in every layer, and compressed entries (CSA by 4 with an indexer, HCA by 128)."""

from dsv4.model.attention.attention import Attention

__all__ = ["Attention"]
