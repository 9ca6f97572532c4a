"""Places of faults in a refused request: `temperature`, `messages[137].role`.

deepseek-recipe says what is wrong and seldom where. It refuses small requests as it refuses large ones, so the place is
found by asking it about parts of the request: a part that is refused in the same words holds the fault. Nothing here
decides what is allowed, so nothing here can refuse what deepseek-recipe accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import cast

from dsv4.server.unchecked_json import Json

# The words in which a request, given as JSON text, is refused; None for one that is not.
Judge = Callable[[str], "str | None"]
# A value, or what stands in for it, put where it belongs into an otherwise good request.
Put = Callable[[object], Json]

_MAX_DEPTH = 8  # no field of the protocols lies deeper
_MAX_FIELDS = 64  # of one object; objects with more are a client's own data
# Characters of requests to be judged for one refusal: some times the whole of a long one, hundreds of a short one.
_BUDGET_FACTOR, _BUDGET_BASE = 3, 10_000_000
_MISSING = re.compile(r"missing field `([^`]+)`")
_NAMED = (
    re.compile(r"'((?:messages|tools|stop|stop_sequences|system)(?:\[\d+\]|\.\w+)+)'"),
    re.compile(r"Invalid (\w+)(?: and \w+)? value"),
    re.compile(r"(tools\[\d+\])"),
)
_DOTTED = re.compile(r"messages\.(\d+)(?:\.content\.(\d+))?")
# Fields that deepseek-recipe knows by the first name and that the client may have sent by the other.
_OTHER_NAMES = {"stop": "stop_sequences", "max_tokens": "max_completion_tokens"}
_SUBSTITUTE = "dsv4-substitute"
_STAND_INS: tuple[object, ...] = ("x", 1, {}, [])


def named_place(text: str, request: Json) -> str | None:
    """The place in `request` that a refusal names itself, None where it names none."""
    dotted = _DOTTED.search(text)
    if dotted is not None:
        content = "" if dotted[2] is None else f".content[{dotted[2]}]"
        return f"messages[{dotted[1]}]{content}"
    if "for 'tool_call_id' of" in text and (index := re.search(r"message\[(\d+)\]", text)):
        return f"messages[{index[1]}]"
    place = next((found[1] for pattern in _NAMED if (found := pattern.search(text))), None)
    name = re.split(r"[\[.]", place or "", maxsplit=1)[0]
    other = _OTHER_NAMES.get(name)
    return place.replace(name, other, 1) if place and other in request and name not in request else place


def locate(request: Json, refusal: str, judge: Judge, *, deep: bool) -> str | None:
    """The place in `request` of the fault that `refusal` is about, None where it belongs to no one place.

    `deep`: whether the fault lies in one value, as what a parser cannot read does, and not in how values go together.
    """
    missing = _MISSING.search(refusal)
    if missing is not None and missing[1] in ("model", "messages") and missing[1] not in request:
        return missing[1]
    model = request.get("model")
    frame: Json = {"model": model if isinstance(model, str) else "x", "messages": [{"role": "user", "content": "x"}]}
    search = _Search(refusal, judge, _BUDGET_FACTOR * len(json.dumps(request)) + _BUDGET_BASE)
    # The model first: it stands beside every other field that is tried.
    for name in sorted(request, key=lambda name: name != "model"):
        place = search.field(name, request[name], frame, deep)
        if place is not None:
            return place
    return None


class _OutOfBudget(Exception):
    """The search has cost enough: the place found so far has to do."""


class _Search:
    """One refusal, looked for in ever smaller parts."""

    def __init__(self, refusal: str, judge: Judge, budget: int) -> None:
        self._refusal = refusal
        self._judge = judge
        self._budget = budget

    def same(self, probe: Json) -> bool:
        return self.words(probe) == self._refusal

    def words(self, probe: Json) -> str | None:
        """The words in which a request is refused. Raises _OutOfBudget."""
        text = json.dumps(probe)
        self._budget -= len(text)
        if self._budget < 0:
            raise _OutOfBudget
        return self._judge(text)

    def field(self, name: str, value: object, frame: Json, deep: bool) -> str | None:
        """The place, if it is in this field of the request; `frame`: a good request without the field."""

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
        """The index of the refused item of an array, "" for other values."""
        items = cast("list[object]", value) if isinstance(value, list) else []
        index = self._first(len(items), lambda low, high: self.same(put(items[low:high])))
        return "" if index is None else f"[{index}]"

    def turn(self, value: object, put: Put) -> str:
        """The index of the refused message. Tool calls and their results are only right together."""
        messages = cast("list[object]", value) if isinstance(value, list) else []
        starts = [*_turns(messages), len(messages)]
        index = self._first(len(starts) - 1, lambda low, high: self.same(put(messages[starts[low] : starts[high]])))
        if index is None:
            return ""
        start, end = starts[index], starts[index + 1]
        return f"[{next(i for i in range(start, end) if self.same(put(messages[start : i + 1])))}]"

    def _first(self, count: int, refused: Callable[[int, int], bool]) -> int | None:
        """The first of `count` things that is refused alone; `refused(low, high)` judges a run of them."""
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if refused(low, middle) else (middle, high)
        if low < high and refused(low, high):
            return low
        return next((index for index in range(count) if refused(index, index + 1)), None)

    def inside(self, value: object, put: Put, depth: int = 0) -> str:
        """The rest of the place: what follows the name of `value`, "" where the fault is the value itself."""
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
            return ""  # it is an array that is not allowed here
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
        """True if it is here that a field of this name is missing: with one, the refusal is another or none."""
        return any(not self.same(put(fields | {name: value})) for value in _STAND_INS)

    def _needed(self, fields: Json, put: Put, keep: str | None) -> Json:
        """The fewest fields that are refused in the same words. `keep`: a field that is missed elsewhere, not here."""
        for name in list(fields):
            if name == keep:
                continue
            rest = {key: value for key, value in fields.items() if key != name}
            if self.same(put(rest)):
                fields = rest
        return fields

    def _faulty(self, fields: Json, put: Put) -> str | None:
        """The one of the needed fields that holds the fault; the others only say what kind of object it is."""
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
        """True if the array is not what is refused: an empty one changes nothing."""
        emptied: Json = {**fields, name: []}
        return self.same(put(emptied))


def _substitutes(value: object) -> Iterator[tuple[object, str, str]]:
    """Another value of the same type, and how a refusal would quote the value and the other one."""
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
    """Where runs of messages begin that can stand alone: a message with tool calls takes the results that follow."""
    answering = False
    for index, message in enumerate(messages):
        if not answering or _role(message) != "tool":
            yield index
            answering = _calls_tools(message)


def _role(message: object) -> object:
    return cast(Json, message).get("role") if isinstance(message, dict) else None


def _calls_tools(message: object) -> bool:
    return _role(message) == "assistant" and bool(cast(Json, message).get("tool_calls"))
