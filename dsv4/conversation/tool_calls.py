"""Tool calls in the markup that models write: understood where they can be, written anew, or told in words.

A tag is told apart from text that only begins like one: a model may explain the markup, or edit a file that holds it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

MARK = "｜DSML｜"
OPENINGS = (f"<{MARK}", f"</{MARK}")
BLOCK, BLOCK_END = f"<{MARK}tool_calls>", f"</{MARK}tool_calls>"
BLOCK_KINDS = frozenset({"tool_calls", "function_calls", "calls"})  # the last is V4.1's
_KINDS = BLOCK_KINDS | {"invoke", "parameter"}

# Everything in a tag is bounded, so that looking for tags takes time in proportion to the text.
_ATTRIBUTE = r"""\s+[\w-]{1,64}\s{0,4}=\s{0,4}(?:"[^"\n]{0,256}"|'[^'\n]{0,256}'|[^\s"'<>=/]{1,256})"""
_HEAD = rf"<(?P<slash>/?){MARK}\s?(?P<kind>\w{{0,32}})(?P<attributes>(?:{_ATTRIBUTE}){{0,8}})"
TAG = re.compile(rf"{_HEAD}\s{{0,8}}(?P<empty>/?)>")
_CUT_ATTRIBUTE = r"""\s+(?:[\w-]{1,64}\s{0,4}(?:=\s{0,4}(?:"[^"\n]{0,256}|'[^'\n]{0,256})?)?)?"""
CUT_TAG = re.compile(rf"{_HEAD}(?:{_CUT_ATTRIBUTE})?/?\Z")
_NAMED = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"']+))""")
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.S)
_SPACE = re.compile(r"\s*")
# An escape of a JSON string: a character in two halves, a half alone, any other.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(?P<half>u[dD][89a-fA-F]\w\w)|.)", re.S)
_WRAPPERS = ("arguments", "parameters", "input")

Schema = Mapping[str, Any]  # the properties of a tool's parameters
Arguments = dict[str, "Value"]
Inside = Literal["invoke", "parameter"] | None


@dataclass(frozen=True)
class Value:
    """An argument: a string, or the JSON text of any value."""

    text: str
    is_string: bool

    @property
    def json(self) -> str:
        return json.dumps(self.text, ensure_ascii=False) if self.is_string else self.text


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Arguments


def inside_after(inside: Inside, tag: re.Match[str]) -> Inside:
    """The element that is open after a tag. In a value only tags that must come after its end count as tags."""
    kind, ends = tag["kind"], bool(tag["slash"] or tag["empty"])
    if kind == "invoke":
        return None if ends else "invoke"
    if kind == "parameter":
        return "invoke" if ends else "parameter"
    return inside


def ends_block(inside: Inside, tag: re.Match[str]) -> bool:
    return bool(tag["slash"]) and tag["kind"] in BLOCK_KINDS and inside != "parameter"


def understand(block: str, tools: Mapping[str, Schema], truncated: bool) -> tuple[str, list[Call]]:
    """A block of markup -> (text that is no call, without tags, and the calls in it).

    `truncated`: the answer was cut off, so a call without its end is none.
    """
    said: list[str] = []
    calls: list[Call] = []
    for part in _parts(block):
        if isinstance(part, str):
            said.append(part)
            continue
        schema = tools.get(part.name, {})
        understood = _arguments(part, schema) if part.name and (part.whole or not truncated) else None
        if understood is None or not (understood[1] or part.whole):
            said.append(part.body(block))
        else:
            said.append(understood[0])
            calls.append(Call(part.name, _unwrapped(part.name, understood[1], schema)))
    texts = [without_tags(text).strip() for text in said]
    return "\n".join(filter(None, texts)), calls


def write(calls: list[Call]) -> str:
    """The calls in the form that the prompts teach."""
    lines = [BLOCK]
    for call in calls:
        lines.append(f'<{MARK}invoke name="{call.name}">')
        lines += [_written(name, value) for name, value in call.arguments.items()]
        lines.append(f"</{MARK}invoke>")
    return "\n".join([*lines, BLOCK_END])


def _written(name: str, value: Value) -> str:
    """One argument. A mark in its strings is written as JSON escapes it: no tag may come of it.

    The name too is written as JSON has it, since deepseek-recipe copies it into the arguments as it is.
    """
    if MARK in value.text:
        value = Value(value.json.replace("｜", "\\uff5c"), False)
    quoted, is_string = json.dumps(name, ensure_ascii=False), str(value.is_string).lower()
    return f'<{MARK}parameter name={quoted} string="{is_string}">{value.text}</{MARK}parameter>'


def in_words(call: Call) -> str:
    inner = ", ".join(f"{json.dumps(name)}: {value.json}" for name, value in call.arguments.items())
    return f"{call.name}({{{without_tags(inner)}}})"


def without_tags(text: str) -> str:
    """The text without markup tags, one cut off at its end too; of what is no tag only its mark goes."""
    text = TAG.sub("", text)
    for opening in OPENINGS:
        start = text.rfind(opening)
        if start >= 0 and CUT_TAG.match(text, start):
            text = text[:start]
    for opening in OPENINGS:
        text = text.replace(opening, "")
    return text


@dataclass
class _Invoke:
    """One call as it is written. `whole`: it has its end; `broken`: a value lacks its end."""

    name: str
    start: int
    end: int = 0
    whole: bool = False
    broken: bool = False
    beside: list[str] = field(default_factory=list[str])  # text that is in no value
    values: list[tuple[dict[str, str], str]] = field(default_factory=list[tuple[dict[str, str], str]])

    def body(self, block: str) -> str:
        return block[self.start : self.end]


def _parts(block: str) -> Iterator[str | _Invoke]:
    """The calls of a block and the text between them, in order."""
    place, inside, value = 0, cast(Inside, None), 0
    invoke: _Invoke | None = None
    attributes: dict[str, str] = {}
    for tag in TAG.finditer(block):
        after = inside_after(inside, tag)
        if tag["kind"] not in _KINDS or (inside == "parameter" == after and tag["kind"] != "parameter"):
            continue  # text, of a value too
        if invoke is None:
            yield block[place : tag.start()]
        elif inside == "parameter":
            if tag["kind"] == "parameter" and tag["slash"]:
                invoke.values.append((attributes, block[value : tag.start()]))
            else:
                invoke.broken = True
        else:
            invoke.beside.append(block[place : tag.start()])
            invoke.broken |= tag["kind"] == "parameter" and bool(tag["slash"])  # the end of a value without beginning
        if invoke is not None and (tag["kind"] == "invoke" or ends_block(inside, tag)):
            invoke.end, invoke.whole = tag.start(), tag["kind"] == "invoke" and bool(tag["slash"])
            yield invoke
            invoke, after = None, after if tag["kind"] == "invoke" else None
        place, inside = tag.end(), after
        if tag["kind"] == "invoke" and not tag["slash"]:
            invoke = _Invoke(_attributes(tag).get("name", ""), tag.end())
            if tag["empty"]:
                invoke.end, invoke.whole = tag.end(), True
                yield invoke
                invoke = None
        elif tag["kind"] == "parameter" and not tag["slash"]:
            attributes, value = _attributes(tag), tag.end()
            if tag["empty"] and invoke is not None:
                invoke.values.append((attributes, ""))
    if invoke is None:
        yield block[place:]
    else:
        invoke.beside.append(block[place:])
        invoke.end, invoke.broken = len(block), invoke.broken or inside == "parameter"
        yield invoke


def _attributes(tag: re.Match[str]) -> dict[str, str]:
    return {name: a or b or c for name, a, b, c in _NAMED.findall(tag["attributes"])}


def _arguments(invoke: _Invoke, schema: Schema) -> tuple[str, Arguments] | None:
    """(text beside the arguments, the arguments) of a call; None where they cannot be told."""
    left = "".join(invoke.beside)
    if invoke.broken or not _is_name(invoke.name):
        return None
    if not invoke.values and left.strip():
        fence = _FENCE.fullmatch(left)
        members = _members(fence[1] if fence else left)
        return None if members is None else ("", members)
    if MARK in left:
        return None  # half a tag: an argument may be lost with it
    arguments: Arguments = {}
    for attributes, text in invoke.values:
        name = attributes.get("name", "")
        if not _is_name(name):
            return None
        arguments[name] = _value(text, attributes.get("string"), schema.get(name))
    return left.strip(), arguments


def _is_name(name: str) -> bool:
    """True for a name that an attribute can hold."""
    return 0 < len(name) <= 256 and not any(c in '"<>\n' for c in name)


def _value(text: str, is_string: str | None, schema: object) -> Value:
    """An argument as its markup says, or where it does not say, as the schema does; what is no JSON is a string."""
    kind = cast(Schema, schema).get("type") if isinstance(schema, Mapping) else None
    if is_string == "true" or (is_string != "false" and kind == "string"):
        return Value(text, True)
    return Value(_whole_characters(text), False) if _is_json(text) else Value(text, True)


def _whole_characters(text: str) -> str:
    """JSON text whose halves of characters are U+FFFD, as decoders give it that do not refuse them."""
    return _ESCAPE.sub(lambda escape: "\\ufffd" if escape["half"] else escape[0], text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return False
    return True


def _finite(text: str) -> float:
    """A number of JSON. One beyond all floats would be told as Infinity, which is no JSON."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


def _members(text: str) -> Arguments | None:
    """The members of a JSON object, each with the JSON text of its value: a number keeps all its digits."""
    text = text.strip()
    if not text.startswith("{") or not _is_json(text):
        return None
    found: Arguments = {}
    for name, value in _raw_members(text):
        if not _is_name(name):
            return None
        found[name] = Value(_whole_characters(value), False)
    return found


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


def _unwrapped(name: str, arguments: Arguments, schema: Schema) -> Arguments:
    """Arguments that came inside one more object, where the schema knows the inner names and not the outer one."""
    outer = {key: value for key, value in arguments.items() if key != "name" or "name" in schema}
    if len(outer) != 1 or (len(outer) < len(arguments) and arguments["name"].json != json.dumps(name)):
        return arguments
    ((key, value),) = outer.items()
    if key not in _WRAPPERS or key in schema:
        return arguments
    text = value.text
    if not value.is_string and text.lstrip().startswith('"'):
        text = cast(str, json.loads(text))  # an object that was written as a string
    inner = _members(text)
    return inner if inner is not None and inner.keys() <= schema.keys() else arguments
