"""Lines that were seen before are left out, within a package and across packages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

LEAST_CHARACTERS = 16  # letters and digits; lines with fewer (headings, rulers, brackets) are the form of a text
LEAST_TEXT = 60  # characters of a text


class SeenLines:
    """Hashes of the lines of earlier packages, and of this package's documents so far."""

    def __init__(self) -> None:
        self._earlier = np.zeros(0, np.uint64)  # sorted
        self._new: set[int] = set()

    def clean(self, text: str, whole: bool) -> str:
        """The new lines of a text; "" for less than LEAST_TEXT characters. A `whole` text is kept or left out."""
        text = text.encode("utf-8", "replace").decode()  # no half surrogate pairs
        kept = (text if self._is_new(text) else "") if whole else self._unique(text)
        return kept if sum(len(line.strip()) for line in kept.split("\n")) >= LEAST_TEXT else ""

    def _unique(self, text: str) -> str:
        """The text without lines seen before, and remember its lines. Blank lines are collapsed."""
        kept: list[str] = []
        lines = text.split("\n")
        keys = [_hash(line) for line in lines]
        known = self._are_earlier(keys)
        for line, key, earlier in zip(lines, keys, known, strict=True):
            if sum(map(str.isalnum, line)) < LEAST_CHARACTERS:
                kept.append(line.rstrip())
            elif not earlier and key not in self._new:
                self._new.add(key)
                kept.append(line.rstrip())
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n") + "\n"

    def _is_new(self, text: str) -> bool:
        """True if this whole text was not seen before; it is remembered."""
        key = _hash(text)
        if key in self._new or bool(self._are_earlier([key])[0]):
            return False
        self._new.add(key)
        return True

    def finish_package(self) -> np.ndarray:
        """End a package; return its new hashes, sorted uint64."""
        new = np.array(sorted(self._new), np.uint64)
        self.add(new)
        self._new = set()
        return new

    def add(self, hashes: np.ndarray) -> None:
        """Add the hashes of a package that an earlier call finished."""
        self._earlier = np.union1d(self._earlier, hashes)

    def _are_earlier(self, keys: Sequence[int]) -> np.ndarray:
        wanted = np.array(keys, np.uint64)
        if not len(self._earlier):
            return np.zeros(len(wanted), bool)
        places = np.minimum(np.searchsorted(self._earlier, wanted), len(self._earlier) - 1)
        return self._earlier[places] == wanted


def _hash(line: str) -> int:
    words = " ".join(line.split())  # the same line in another indentation
    return int.from_bytes(blake2b(words.encode("utf-8", "replace"), digest_size=8).digest(), "little")
