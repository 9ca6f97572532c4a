"""Where everything of a ragged batch lies: tiles, windows, compression windows, visible entries. Index arithmetic only.

`layout.py` puts the parts together: `tokens.py`, `tiles.py`, `window.py`, `compression.py`, `groups.py`.
"""

from dsv4.model.layout.compression import CompressionLayout
from dsv4.model.layout.layout import Layout

__all__ = ["CompressionLayout", "Layout"]
