"""`truncation: auto` of the Responses API: the oldest turns of a conversation that is too long are dropped."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TypeVar, cast

from dsv4.server.unchecked_json import Json

T = TypeVar("T")
_LASTING = ("system", "developer")  # roles whose messages stay


def shortest_cut(items: list[object], attempt: Callable[[list[object]], T | None]) -> T | None:
    """Result of `attempt` on the items without the fewest turns for which it is not None; None if it always is."""
    starts = [index for index, item in enumerate(items) if index and _begins_turn(items[index - 1], item)]
    results: dict[int, T | None] = {}

    def fits(start: int) -> bool:
        results[start] = attempt([item for item in items[:start] if _role(item) in _LASTING] + items[start:])
        return results[start] is not None

    place = bisect_left(starts, True, key=fits)
    return results[starts[place]] if place < len(starts) else None


def _begins_turn(before: object, item: object) -> bool:
    return _role(item) == "user" and _role(before) != "user"


def _role(item: object) -> object:
    return cast(Json, item).get("role") if isinstance(item, dict) else None
