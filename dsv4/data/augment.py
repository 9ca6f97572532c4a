"""Changes of plain text's tokens at a rate: a middle to fill in, and merged punctuation with line breaks split again.

Both are DeepSeek-V3's, which V4 keeps; V3's rate of documents to fill in is 0.1. Conversations are left as they are.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from random import Random

import numpy as np

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS, FIM


@dataclass(frozen=True)
class Rates:
    """Share of texts with a middle to fill in, share of merged tokens that are split."""

    fill_in_middle: float = 0.0
    split_merged: float = 0.0

    def __post_init__(self) -> None:
        for name, rate in (("fill_in_middle", self.fill_in_middle), ("split_merged", self.split_merged)):
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name} is {rate}; allowed: 0 to 1")

    def __bool__(self) -> bool:
        return self.fill_in_middle > 0 or self.split_merged > 0


class Augmenter:
    """Applies `rates` to the tokens of plain text."""

    def __init__(self, tokenizer: Tokenizer, rates: Rates) -> None:
        self._tokenizer, self._rates = tokenizer, rates
        self._bos, self._eos = tokenizer.special_id(BOS), tokenizer.special_id(EOS)
        self._marks = [tokenizer.special_id(mark) for mark in FIM] if rates.fill_in_middle else []
        self._parts = find_merged(tokenizer) if rates.split_merged else {}
        self._merged = np.array(sorted(self._parts), np.int64)

    def apply(self, ids: np.ndarray, seed: int, limit: int) -> np.ndarray:
        """Change a text's ids by draws from `seed`; a result of more than `limit` tokens is not made."""
        random = Random(seed)
        if random.random() < self._rates.fill_in_middle:
            filled = self._fill_in_middle(ids, random)
            return ids if filled is None or len(filled) > limit else filled
        return self._split_merged(ids, random, limit)

    def _fill_in_middle(self, ids: np.ndarray, random: Random) -> np.ndarray | None:
        """[BOS] begin prefix hole suffix end middle [EOS], cut at two characters; None for half a character."""
        hole, begin, end = self._marks
        first, last = int(ids[0] == self._bos), len(ids) - int(ids[-1] == self._eos)
        try:
            text = b"".join(map(self._tokenizer.token_bytes, ids[first:last].tolist())).decode("utf-8")
        except UnicodeDecodeError:
            return None  # a piece of a longer document, cut within a character
        a, b = sorted(int(random.random() * (len(text) + 1)) for _ in range(2))
        prefix, middle, suffix = self._tokenizer.encode_batch([text[:a], text[a:b], text[b:]])
        return np.array([*ids[:first], begin, *prefix, hole, *suffix, end, *middle, *ids[last:]], ids.dtype)

    def _split_merged(self, ids: np.ndarray, random: Random, limit: int) -> np.ndarray:
        rate = self._rates.split_merged
        if not rate or not len(self._merged):
            return ids
        hits = [int(n) for n in np.flatnonzero(np.isin(ids, self._merged)) if random.random() < rate]
        pieces: list[np.ndarray] = []
        done, length = 0, len(ids)
        for hit in hits:
            parts = self._parts[int(ids[hit])]
            if length + len(parts) - 1 > limit:
                break
            pieces += [ids[done:hit], parts.astype(ids.dtype)]
            done, length = hit + 1, length + len(parts) - 1
        return np.concatenate([*pieces, ids[done:]]) if pieces else ids


def find_merged(tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Tokens that join punctuation and the line break after it -> ids of the punctuation and of the rest."""
    special = set(tokenizer.special_tokens.values())
    found: dict[int, np.ndarray] = {}
    for token in range(tokenizer.vocab_size):
        if token in special:
            continue
        try:
            text = tokenizer.token_bytes(token).decode("utf-8")
        except (ValueError, UnicodeDecodeError):
            continue  # an unused id, or a part of a character
        cut = text.find("\n")
        if cut > 0 and unicodedata.category(text[:cut].rstrip(" \t\r")[-1:] or " ")[0] in "PS":
            found[token] = np.array([*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:])], np.int64)
    return found
