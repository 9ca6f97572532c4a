"""`truncation: auto` of the Responses API: the oldest part of a conversation that is too long is dropped.

First whole turns go, then, within the last one, what the model did after its question: rounds of calls and outputs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TypeVar, cast

from dsv4.server.response_items import OUTPUTS, kind_of
from dsv4.server.unchecked_json import Json

T = TypeVar("T")
_LASTING = ("system", "developer")  # roles whose messages stay


def shortest_cut(items: list[object], attempt: Callable[[list[object]], T | None]) -> T | None:
    """Result of `attempt` on the items without the fewest turns and rounds for which it is not None; None if it always
    is."""
    places = range(1, len(items))
    turns = [place for place in places if _begins_turn(items[place - 1], items[place])]
    last = turns[-1] if turns else 0
    answer = next((place for place in places if place > last and _role(items[place]) != "user"), len(items))
    rounds = [place for place in places if place > answer and _begins_round(items[place - 1], items[place])]
    cuts = [(start, start) for start in turns] + [(answer, start) for start in rounds]
    results: dict[int, T | None] = {}

    def fits(cut: int) -> bool:
        """Without the items before the last turn's question, or up to a turn; and between both places of the cut."""
        end, start = cuts[cut]
        question = items[last:end] if end < start else []
        dropped = items[: last if question else start] + (items[end:start] if question else [])
        lasting = [item for item in dropped if _role(item) in _LASTING]
        results[cut] = attempt([*lasting, *question, *items[start:]])
        return results[cut] is not None

    place = bisect_left(range(len(cuts)), True, key=fits)
    return results[place] if place < len(cuts) else None


def _begins_turn(before: object, item: object) -> bool:
    return _role(item) == "user" and _role(before) != "user"


def _begins_round(before: object, item: object) -> bool:
    """True if the model goes on after the outputs of its calls."""
    return kind_of(before) in OUTPUTS and kind_of(item) not in OUTPUTS


def _role(item: object) -> object:
    return cast(Json, item).get("role") if isinstance(item, dict) else None
