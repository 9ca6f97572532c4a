"""Stop strings: withholds text that may begin a stop string, and cuts the text before a match."""

from __future__ import annotations


class StopMatcher:
    """Matches stop strings in text that comes in pieces of any size; output never holds any part of a match.

    Among several matches the one that ends first wins, then the longer one (as if characters came one by one).
    """

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._stop_strings = sorted(stop_strings, key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Adds text; returns the text that is safe to show. After a match (`matched` is set) all text is dropped."""
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
        """Returns the withheld text when no more text follows."""
        shown, self._held = self._held, ""
        return shown

    def _partial_match_length(self) -> int:
        """Length of the held text's longest suffix that is a prefix of a stop string."""
        longest = max(len(stop) for stop in self._stop_strings) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
