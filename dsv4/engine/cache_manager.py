"""CacheManager: owns the model's cache. Admission asks it whether a request fits, the end of a request goes to it."""

from __future__ import annotations

from dsv4.engine.model import EngineCache, TruncatableCache
from dsv4.engine.request import Request


class CacheManager:
    """Gives each running request a cache row (`request.slot`) of its own."""

    def __init__(self, cache: EngineCache, num_slots: int) -> None:
        self.cache = cache
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def can_allocate(self, request: Request) -> bool:
        """True if a request that waits fits beside those that run."""
        return bool(self._free_slots)

    def allocate(self, request: Request) -> None:
        """Gives a request its row; `can_allocate` holds."""
        request.slot = self._free_slots.pop()

    def truncate(self, request: Request) -> None:
        """Takes back what the row holds beyond the request's computed tokens, such as rejected drafts."""
        assert isinstance(self.cache, TruncatableCache), "drafts are scheduled only for a cache that can take them back"
        self.cache.truncate(request.slot, request.num_computed_tokens)

    def release(self, request: Request) -> None:
        """Empties the request's row, if it has one, for the next request."""
        slot, request.slot = request.slot, -1
        if slot >= 0:
            self._free_slots.append(slot)
            self.cache.reset(slot)
