"""Lower bound on the tokens of a text, from its bytes alone: a text that is far too long need not be tokenized.

Every byte of a text lies in one token, and no token that holds a byte b is longer than longest[b], the length of the
longest such token in the vocabulary. If each byte counts 1 / longest[b], the bytes of one token sum to at most 1, so
the sum over a text's bytes is at most its number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

# Pre-tokenizers of a tokenizer.json that keep every byte of the text. Others may drop bytes: then there is no bound.
_KEEPING = ("Sequence", "Split", "ByteLevel", "Digits")
_SLICE = 1 << 20  # bytes counted at a time: other threads run between two slices


class LengthBound:
    """Lower bound on token counts, from the longest token that holds each byte."""

    def __init__(self, tokens: Iterable[bytes]) -> None:
        """`tokens`: all tokens of plain text. A byte that is no token itself may be dropped from text: it counts 0."""
        longest = np.zeros(256)
        alone = np.zeros(256, bool)
        for token in tokens:
            held = np.frombuffer(token, np.uint8)
            longest[held] = np.maximum(longest[held], len(token))
            alone[held] |= len(token) == 1
        self._share = np.divide(1.0, longest, out=np.zeros(256), where=alone)

    def tokens(self, text: str) -> int:
        """Lower bound on the number of tokens of `text`."""
        data = np.frombuffer(text.encode("utf-8", errors="surrogatepass"), np.uint8)
        counts = np.zeros(256)
        for start in range(0, len(data), _SLICE):
            counts += np.bincount(data[start : start + _SLICE], minlength=256)
        return math.ceil(float(counts @ self._share) * (1 - 1e-9))  # margin: rounding must not raise the bound by one


def keeps_every_byte(definition: dict[str, Any]) -> bool:
    """True if no step before the BPE in a tokenizer.json removes or replaces text."""
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
