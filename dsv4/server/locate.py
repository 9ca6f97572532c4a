"""Locates the fault in a refused request: `temperature`, `messages[137].role`.

deepseek-recipe says what is wrong, but seldom where. It treats small requests like large ones, so the place is found by
testing parts of the request: a part that is refused with the same message holds the fault. This module decides nothing
about what is allowed, so it cannot refuse what deepseek-recipe accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import cast

from dsv4.server.unchecked_json import Json

# JSON text of a request -> the message that refuses it, None if it is accepted.
Judge = Callable[[str], "str | None"]
# Puts a value or its substitute into its place in an otherwise valid request.
Put = Callable[[object], Json]

_MAX_DEPTH = 8  # no field of the protocols is nested deeper
_MAX_FIELDS = 64  # per object; larger objects are a client's own data
# Budget per refusal, in characters of tested requests: a few times a long request, hundreds of times a short one.
_BUDGET_FACTOR, _BUDGET_BASE = 3, 10_000_000
_MISSING = re.compile(r"missing field `([^`]+)`")
_NAMED = (
    re.compile(r"'((?:messages|tools|stop|stop_sequences|system)(?:\[\d+\]|\.\w+)+)'"),
    re.compile(r"Invalid (\w+)(?: and \w+)? value"),
    re.compile(r"(tools\[\d+\])"),
)
_DOTTED = re.compile(r"messages\.(\d+)(?:\.content\.(\d+))?")
# Field name in deepseek-recipe -> the other names that a client may have sent.
_OTHER_NAMES = {"stop": ("stop_sequences",), "max_tokens": ("max_completion_tokens", "max_output_tokens")}
_SUBSTITUTE = "dsv4-substitute"
_STAND_INS: tuple[object, ...] = ("x", 1, {}, [])


def named_place(text: str, request: Json) -> str | None:
    """Place in `request` that the refusal's message names; None if it names none."""
    dotted = _DOTTED.search(text)
    if dotted is not None:
        content = "" if dotted[2] is None else f".content[{dotted[2]}]"
        return f"messages[{dotted[1]}]{content}"
    if "for 'tool_call':" in text and "tool_choice" in request:
        return "tool_choice"
    if "for 'tool_call_id' of" in text and (index := re.search(r"message\[(\d+)\]", text)):
        return f"messages[{index[1]}]"
    place = next((found[1] for pattern in _NAMED if (found := pattern.search(text))), None)
    name = re.split(r"[\[.]", place or "", maxsplit=1)[0]
    other = next((other for other in _OTHER_NAMES.get(name, ()) if other in request), None)
    return place.replace(name, other, 1) if place and other and name not in request else place


def locate(request: Json, refusal: str, judge: Judge, *, deep: bool) -> str | None:
    """Place in `request` of the fault behind `refusal`; None if no single place is at fault.

    `deep`: True if the fault lies in one value (a parser's error), False if it may lie in a combination of values.
    """
    missing = _MISSING.search(refusal)
    if missing is not None and missing[1] in ("model", "messages") and missing[1] not in request:
        return missing[1]
    model = request.get("model")
    frame: Json = {"model": model if isinstance(model, str) else "x"}
    frame |= {"messages": [{"role": "user", "content": "x"}], "input": "x"}  # each protocol ignores the other's
    search = _Search(refusal, judge, _BUDGET_FACTOR * len(json.dumps(request)) + _BUDGET_BASE)
    # The model first: every later test request contains it.
    for name in sorted(request, key=lambda name: name != "model"):
        place = search.field(name, request[name], frame, deep)
        if place is not None:
            return place
    return None


class _OutOfBudget(Exception):
    """The budget is spent: the place found so far has to do."""


class _Search:
    """Search for the fault behind one refusal, in ever smaller parts of the request."""

    def __init__(self, refusal: str, judge: Judge, budget: int) -> None:
        self._refusal = refusal
        self._judge = judge
        self._budget = budget

    def same(self, probe: Json) -> bool:
        return self.words(probe) == self._refusal

    def words(self, probe: Json) -> str | None:
        """Message that refuses a request, None if it is accepted. Raises _OutOfBudget."""
        text = json.dumps(probe)
        self._budget -= len(text)
        if self._budget < 0:
            raise _OutOfBudget
        return self._judge(text)

    def field(self, name: str, value: object, frame: Json, deep: bool) -> str | None:
        """Place of the fault in this field, None if it lies elsewhere; `frame`: a valid request without the field."""

        def put(part: object) -> Json:
            return frame | {name: part}

        place = None
        try:
            if self.same(put(value)):
                place = name
                if deep:
                    return name + self.inside(value, put)
                return name + (self.turn(value, put) if name == "messages" else self.item(value, put))
        except _OutOfBudget:
            pass
        return place

    def item(self, value: object, put: Put) -> str:
        """Index of the refused item of an array, "" for other values."""
        items = cast("list[object]", value) if isinstance(value, list) else []
        index = self._first(len(items), lambda low, high: self.same(put(items[low:high])))
        return "" if index is None else f"[{index}]"

    def turn(self, value: object, put: Put) -> str:
        """Index of the refused message. Tool calls and their results are valid only together."""
        messages = cast("list[object]", value) if isinstance(value, list) else []
        starts = [*_turns(messages), len(messages)]
        index = self._first(len(starts) - 1, lambda low, high: self.same(put(messages[starts[low] : starts[high]])))
        if index is None:
            return ""
        start, end = starts[index], starts[index + 1]
        return f"[{next(i for i in range(start, end) if self.same(put(messages[start : i + 1])))}]"

    def _first(self, count: int, refused: Callable[[int, int], bool]) -> int | None:
        """Index of the first of `count` items that is refused alone; `refused(low, high)` tests a range of items."""
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if refused(low, middle) else (middle, high)
        if low < high and refused(low, high):
            return low
        return next((index for index in range(count) if refused(index, index + 1)), None)

    def inside(self, value: object, put: Put, depth: int = 0) -> str:
        """Rest of the place after the name of `value`; "" if the value itself is at fault."""
        if depth == _MAX_DEPTH:
            return ""
        try:
            if isinstance(value, list):
                return self._in_items(cast("list[object]", value), put, depth)
            if isinstance(value, dict) and len(cast(Json, value)) <= _MAX_FIELDS:
                return self._in_fields(cast(Json, value), put, depth)
        except _OutOfBudget:
            pass
        return ""

    def _in_items(self, items: list[object], put: Put, depth: int) -> str:
        if self.same(put([])):
            return ""  # an array is not allowed here
        index = self._first(len(items), lambda low, high: self.same(put(items[low:high])))
        if index is None:
            return ""
        return f"[{index}]" + self.inside(items[index], lambda part: put([part]), depth + 1)

    def _in_fields(self, fields: Json, put: Put, depth: int) -> str:
        missing = _MISSING.search(self._refusal)
        if missing is not None and missing[1] not in fields and self._is_missed(fields, missing[1], put):
            return ""
        needed = self._needed(fields, put, keep=missing[1] if missing is not None else None)
        name = self._faulty(needed, put)
        if name is None:
            return ""
        return f".{name}" + self.inside(needed[name], lambda part: put(needed | {name: part}), depth + 1)

    def _is_missed(self, fields: Json, name: str, put: Put) -> bool:
        """True if this object lacks the missing field: adding the field changes the refusal."""
        return any(not self.same(put(fields | {name: value})) for value in _STAND_INS)

    def _needed(self, fields: Json, put: Put, keep: str | None) -> Json:
        """Minimal fields with the same refusal. `keep`: a field that stays, as it is missing elsewhere, not here."""
        for name in list(fields):
            if name == keep:
                continue
            rest = {key: value for key, value in fields.items() if key != name}
            if self.same(put(rest)):
                fields = rest
        return fields

    def _faulty(self, fields: Json, put: Put) -> str | None:
        """Name of the needed field that holds the fault; the other needed fields only determine the object's type."""
        for name, value in fields.items():
            for other, shown, instead in _substitutes(value):
                renamed = self._refusal.replace(shown, instead, 1)
                if renamed != self._refusal and self.words(put(fields | {name: other})) == renamed:
                    return name
        for name, value in fields.items():
            if isinstance(value, dict) or (isinstance(value, list) and value and not self._spared(fields, name, put)):
                return name
        rest = [name for name in fields if name not in ("role", "type")] or list(fields)
        return rest[-1] if rest and _MISSING.search(self._refusal) is None else None

    def _spared(self, fields: Json, name: str, put: Put) -> bool:
        """True if the array is not at fault: emptied, the refusal stays the same."""
        emptied: Json = {**fields, name: []}
        return self.same(put(emptied))


def _substitutes(value: object) -> Iterator[tuple[object, str, str]]:
    """Substitutes of the same type: (substitute, the value as refusals quote it, the substitute as they quote it)."""
    if isinstance(value, bool):
        yield not value, f"`{str(value).lower()}`", f"`{str(not value).lower()}`"
    elif isinstance(value, int):
        other = value + 1 if value >= 0 else value - 1
        yield other, f"`{value}`", f"`{other}`"
    elif isinstance(value, float):
        yield value * 2, f"`{value}`", f"`{value * 2}`"
    elif isinstance(value, str):
        yield _SUBSTITUTE, f'"{value}"', f'"{_SUBSTITUTE}"'
        yield _SUBSTITUTE, f"`{value}`", f"`{_SUBSTITUTE}`"
    elif value is None:
        yield _SUBSTITUTE, "null", f'string "{_SUBSTITUTE}"'


def _turns(messages: list[object]) -> Iterator[int]:
    """Start indices of runs of messages that can stand alone: a message with tool calls includes its results."""
    answering = False
    for index, message in enumerate(messages):
        if not answering or _role(message) != "tool":
            yield index
            answering = _calls_tools(message)


def _role(message: object) -> object:
    return cast(Json, message).get("role") if isinstance(message, dict) else None


def _calls_tools(message: object) -> bool:
    return _role(message) == "assistant" and bool(cast(Json, message).get("tool_calls"))
