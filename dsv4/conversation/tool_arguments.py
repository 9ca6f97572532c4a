"""Arguments of tool calls, read from the model's markup or JSON and kept as text: numbers keep all their digits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from dsv4.conversation.tool_tags import plain

_SPACE = re.compile(r"\s*")
# An escape of a JSON string: a surrogate pair, a lone surrogate (`half`), or any other.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(?P<half>u[dD][89a-fA-F]\w\w)|.)", re.S)
_WRAPPERS = ("arguments", "parameters", "input")

Schema = Mapping[str, Any]  # the properties of a tool's parameters
Arguments = dict[str, "Value"]


@dataclass(frozen=True)
class Value:
    """An argument: a plain string, or a value as JSON text."""

    text: str
    is_string: bool

    @property
    def json(self) -> str:
        return json.dumps(self.text, ensure_ascii=False) if self.is_string else self.text


def read_value(text: str, is_string: str | None, schema: object) -> Value:
    """Argument of the type that its markup declares, else the schema; text that is not JSON is a string."""
    if is_text(is_string, schema):
        return Value(text, True)
    return Value(_whole_characters(text), False) if _is_json(text) else Value(text, True)


def is_text(is_string: str | None, schema: object) -> bool:
    """True for an argument that is a string whatever its text: its markup says so, else the schema."""
    kind = cast(Schema, schema).get("type") if isinstance(schema, Mapping) else None
    return is_string == "true" or (is_string != "false" and kind == "string")


def read_object(text: str) -> Arguments | None:
    """Members of a JSON object, each value as its JSON text; None if `text` is no object or a name is unusable."""
    text = text.strip()
    if not text.startswith("{") or not _is_json(text):
        return None
    found: Arguments = {}
    for name, value in _raw_members(text):
        if not is_name(name):
            return None
        found[name] = Value(_whole_characters(value), False)
    return found


def unwrap(name: str, arguments: Arguments, schema: Schema) -> Arguments:
    """Arguments freed of a wrapper object, if the schema has the inner names and not the outer."""
    outer = {key: value for key, value in arguments.items() if key != "name" or "name" in schema}
    if len(outer) != 1 or (len(outer) < len(arguments) and not _is_text(arguments["name"], name)):
        return arguments
    ((key, value),) = outer.items()
    if key not in _WRAPPERS or key in schema:
        return arguments
    text = value.text
    if not value.is_string and text.lstrip().startswith('"'):
        text = cast(str, json.loads(text))  # an object encoded as a JSON string
    inner = read_object(text)
    return inner if inner is not None and set(map(plain, inner)) <= schema.keys() else arguments


def _is_text(value: Value, text: str) -> bool:
    """True if the value is this text, as a string or as JSON."""
    return value.json in (json.dumps(text), json.dumps(text, ensure_ascii=False))


def is_name(name: str) -> bool:
    """True if the name fits into a tag's attribute: 1 to 256 characters, none of `"<>` and newline."""
    return 0 < len(name) <= 256 and not any(c in '"<>\n' for c in name)


def _whole_characters(text: str) -> str:
    """JSON text with each lone surrogate replaced by U+FFFD, as lenient decoders do."""
    return _ESCAPE.sub(lambda escape: "\\ufffd" if escape["half"] else escape[0], text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError):
        return False
    return True


def finite(text: str) -> float:
    """Parses a JSON number. ValueError if it overflows a float: it would be written as Infinity, which is not JSON."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


def _raw_members(text: str) -> Iterator[tuple[str, str]]:
    decoder, place = json.JSONDecoder(), _after_space(text, 1)
    while text[place] != "}":
        name, place = cast("tuple[str, int]", decoder.raw_decode(text, text.index('"', place)))
        place = _after_space(text, text.index(":", place) + 1)
        _, end = decoder.raw_decode(text, place)
        yield name, text[place:end]
        place = _after_space(text, end)
        if text[place] == ",":
            place = _after_space(text, place + 1)


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()
