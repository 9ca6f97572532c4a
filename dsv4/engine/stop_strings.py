"""Holds back text that may be the beginning of a stop string and cuts the text where one appears."""

from __future__ import annotations


class StopMatcher:
    """Feed text in pieces of any size; what comes out never holds a stop string or a part of one that was found.

    Among several stop strings the one that ends first wins, then the longer one (as if characters came one by one).
    """

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._stop_strings = sorted(stop_strings, key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show. After a match (`matched` is set) everything further is dropped."""
        if self.matched is not None:
            return ""
        if not self._stop_strings:
            return text
        self._held += text
        found = [(self._held.find(stop) + len(stop), stop) for stop in self._stop_strings if stop in self._held]
        if found:
            end, self.matched = min(found, key=lambda hit: hit[0])  # min keeps the first, longest, of equal ends
            shown, self._held = self._held[: end - len(self.matched)], ""
            return shown
        keep = self._partial_match_length()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text still held back, once it is known that nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _partial_match_length(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max(len(stop) for stop in self._stop_strings) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
