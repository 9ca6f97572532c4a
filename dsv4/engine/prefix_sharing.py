"""Prompts that begin alike are read once: one that waits lets another, which is being read, compute what they share.

It waits for a state that the other is going to store: at the end of the other's prompt, or where the two part, at the
end of a whole block. It waits only while the other reads towards that place, and for nobody who may be kept from
reading on: the other is the prompt that is read first, or of the same user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dsv4.cache import PrefixCache
from dsv4.config import PAGE_TOKENS
from dsv4.engine.request import Request

MIN_SAVED = 32  # tokens: fewer are computed sooner than waited for


class PrefixSharing:
    """Says which waiting prompts are to wait for others. `stored`: tokens that a prompt would begin with now."""

    def __init__(self, prefixes: PrefixCache | None, stored: Callable[[Request], int]) -> None:
        self._keeps = prefixes is not None and prefixes.max_bytes > 0
        self._stored = stored
        self._common: dict[Request, dict[int, int]] = {}  # waiting -> id of one being read -> tokens alike

    def plan(self, request: Request, others: Iterable[Request]) -> None:
        """Lets prompts that are being read, or begin in this step, store what they share with one that waits."""
        for other in others:
            common = self._common_tokens(request, other)
            if common < MIN_SAVED or self._saved(request, other, common) >= MIN_SAVED:
                continue
            blocks = common - common % PAGE_TOKENS
            known = max(other.num_computed_tokens, self._stored(request))
            if blocks - known >= MIN_SAVED and other.shared_tokens <= other.num_computed_tokens:
                other.shared_tokens = blocks

    def awaits(self, request: Request, reading: Iterable[Request]) -> bool:
        """True for a prompt that is to wait for one of those that are being read, the first of them first."""
        for place, other in enumerate(reading):
            if place and other.user != request.user:
                continue
            common = self._common_tokens(request, other)
            if common >= MIN_SAVED and self._saved(request, other, common) >= MIN_SAVED:
                return True
        return False

    def forget(self, request: Request) -> None:
        """A request has begun or ended."""
        self._common.pop(request, None)

    def _saved(self, request: Request, other: Request, common: int) -> int:
        """Tokens that a request need not compute once another has stored its next places; below 1: none."""
        prompt, computed = len(other.prompt_token_ids), other.num_computed_tokens
        places = (prompt - 1, prompt, other.common_tokens, other.shared_tokens)
        longest = max((place for place in places if computed < place <= common), default=0)
        return longest - self._stored(request)

    def _common_tokens(self, request: Request, other: Request) -> int:
        """Tokens that two prompts begin with and that the first could go on from; 0 where they may share nothing."""
        if not self._keeps:
            return 0
        known = self._common.setdefault(request, {})
        if other.request_id not in known:
            shares = not request.params.prompt_logprobs and request.params.cache_salt == other.params.cache_salt
            same = _common_length(request.prompt_token_ids, other.prompt_token_ids) if shares else 0
            known[other.request_id] = same
        return min(known[other.request_id], request.num_tokens - 1)


def _common_length(first: list[int], second: list[int]) -> int:
    """Elements that two lists begin with alike."""
    most = min(len(first), len(second))
    for start in range(0, most, PAGE_TOKENS):
        stop = min(start + PAGE_TOKENS, most)
        if first[start:stop] != second[start:stop]:
            return next(place for place in range(start, stop) if first[place] != second[place])
    return most
