"""Index tables of a ragged batch: tiles, windows, compression windows, visible entries. Index arithmetic only.

`layout.py` combines the parts: `tokens.py`, `tiles.py`, `window.py`, `compression.py`, `groups.py`.
"""

from dsv4.model.layout.compression import CompressionLayout
from dsv4.model.layout.layout import Layout

__all__ = ["CompressionLayout", "Layout"]
