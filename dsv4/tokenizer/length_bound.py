"""The fewest tokens that a text can become, from its bytes alone: a text that is far too long need not be tokenised.

Every byte of a text lies in one token, and no token that holds a byte b is longer than longest[b], the longest token of
the vocabulary with b in it. A token's bytes thus share at most one among them if each counts 1 / longest[b], and the
sum over a text's bytes is at most its number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

# Parts of a tokenizer.json that keep every byte of the text. Others may drop some, and nothing is known of the length.
_KEEPING = ("Sequence", "Split", "ByteLevel", "Digits")
_SLICE = 1 << 20  # bytes counted at a time: between two slices other threads run


class LengthBound:
    """Counts bytes against the vocabulary's longest tokens."""

    def __init__(self, tokens: Iterable[bytes]) -> None:
        """`tokens`: all that plain text may become. A byte that is no token itself may be dropped: it counts 0."""
        longest = np.zeros(256)
        alone = np.zeros(256, bool)
        for token in tokens:
            held = np.frombuffer(token, np.uint8)
            longest[held] = np.maximum(longest[held], len(token))
            alone[held] |= len(token) == 1
        self._share = np.divide(1.0, longest, out=np.zeros(256), where=alone)

    def tokens(self, text: str) -> int:
        """A number that the tokens of `text` reach or exceed."""
        data = np.frombuffer(text.encode("utf-8", errors="surrogatepass"), np.uint8)
        counts = np.zeros(256)
        for start in range(0, len(data), _SLICE):
            counts += np.bincount(data[start : start + _SLICE], minlength=256)
        return math.ceil(float(counts @ self._share) * (1 - 1e-9))  # rounding must not make it one too many


def keeps_every_byte(definition: dict[str, Any]) -> bool:
    """True if no step of a tokenizer.json before the BPE removes or replaces text."""
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        return False
    return _keeps(definition.get("pre_tokenizer"))


def _keeps(step: dict[str, Any] | None) -> bool:
    if step is None:
        return True
    if step.get("type") not in _KEEPING or step.get("behavior") == "Removed":
        return False
    return all(_keeps(part) for part in step.get("pretokenizers", ()))
