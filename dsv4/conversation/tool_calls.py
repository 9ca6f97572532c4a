"""Tool calls in a model's markup: parsed leniently, rewritten in canonical form, or described in plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from dsv4.conversation.tool_arguments import (
    Arguments,
    Schema,
    Value,
    is_name,
    is_text,
    read_object,
    read_value,
    unwrap,
)
from dsv4.conversation.tool_tags import (
    BLOCK,
    BLOCK_END,
    KINDS,
    MARK,
    TAG,
    Inside,
    attributes_of,
    ends_block,
    inside_after,
    plain,
    possible_beginning,
    without_cut_tag,
    without_tags,
)

# How a block has ended: with its last tag or the reasoning around it, or where the model or the limit ended the answer.
End = Literal["block", "stop", "length"]

INVALID = "INVALID_JSON"  # argument under which Anthropic has clients send back what is no JSON
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.S)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Arguments

    @property
    def arguments_json(self) -> str:
        return f"{{{_members(self.arguments)}}}"

    def plain(self) -> Call:
        """The call with what its arguments spell."""
        return Call(self.name, {plain(name): Value(plain(v.text), v.is_string) for name, v in self.arguments.items()})


@dataclass(frozen=True)
class CutCall:
    """A call in which the model has stopped, in forms that no client takes for a whole call.

    Without them it would be one with fewer arguments: many clients complete JSON whose end is missing.
    arguments: the last may be `open`: as much as there is of a string, or nothing of any other value.
    """

    name: str
    arguments: Arguments
    open: bool

    def told(self) -> Call:
        """Call whose one argument is the text of its arguments, for clients to which an input is always JSON."""
        text = f"{{{_members(self.arguments)}"
        return Call(self.name, {INVALID: Value(text.removesuffix('"') if self.open else text, True)})

    def unreadable(self) -> Call:
        """Call whose arguments are no JSON, and no beginning of any."""
        return Call(self.name, {**self.arguments, INVALID: Value("]", False)})


@dataclass(frozen=True)
class Understood:
    """Contents of a block of markup.

    said: text outside calls, without tags. cut: the call in which the model has stopped. exact: every part of the block
    is a call, or is `cut`.
    """

    said: str
    calls: list[Call]
    cut: CutCall | None
    exact: bool


def understand(block: str, tools: Mapping[str, Schema], end: End) -> Understood:
    """Reads the calls of a block of markup, leniently."""
    if end == "length":
        block = block[: len(block) - possible_beginning(block)]
    said: list[str] = []
    calls: list[Call] = []
    cut: CutCall | None = None
    exact = True
    for part in _parts(block):
        if isinstance(part, str):
            said.append(part)
            continue
        schema = tools.get(part.name, {})
        understood = _arguments(part, schema) if part.name and (part.whole or end != "length") else None
        if understood is not None and (understood[1] or part.whole):
            said.append(understood[0])
            calls.append(Call(part.name, unwrap(part.name, understood[1], schema)))
        elif end == "stop" and part.end == len(block) and not part.whole and is_name(part.name):
            cut = _cut(part, schema)
        else:
            said.append(part.body(block))
            exact = False
    texts = [without_tags(text).strip() for text in said]
    text = "\n".join(filter(None, texts))
    return Understood(text, calls, cut, exact and not text and bool(calls or cut))


def write(calls: Sequence[Call], begun: bool = False, end: str = f"\n{BLOCK_END}") -> str:
    """Calls in canonical markup, as the prompts teach it. `begun`: calls of the same block stand before."""
    lines = ["" if begun else BLOCK]
    for call in calls:
        lines += [_opening(call.name), *_values(call.arguments), f"</{MARK}invoke>"]
    return "\n".join(lines) + end


def _opening(name: str) -> str:
    return f'<{MARK}invoke name="{name}">'


def _values(arguments: Arguments) -> list[str]:
    return [_written(name, value) + f"</{MARK}parameter>" for name, value in arguments.items()]


def _written(name: str, value: Value) -> str:
    """Markup of one argument up to its end tag. The tag mark ｜ in a value is JSON-escaped, so that it forms no tag.

    The name is JSON-escaped too, since deepseek-recipe copies it into the arguments unchanged; spaces as well, at which
    it would cut the name.
    """
    if MARK in value.text:
        value = Value(value.json.replace("｜", "\\uff5c"), False)
    quoted = json.dumps(name, ensure_ascii=False).replace(" ", "\\u0020")
    is_string = str(value.is_string).lower()
    return f'<{MARK}parameter name={quoted} string="{is_string}">{value.text}'


def _members(arguments: Arguments) -> str:
    return ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {value.json}" for name, value in arguments.items())


def _cut(invoke: _Invoke, schema: Schema) -> CutCall:
    arguments: Arguments = {}
    for attributes, text in invoke.values:
        if is_name(name := attributes.get("name", "")):
            arguments[plain(name)] = read_value(plain(text), attributes.get("string"), schema.get(plain(name)))
    attributes, text = invoke.open or ({}, "")
    name = plain(attributes.get("name", ""))
    if not is_name(name):
        return CutCall(invoke.name, arguments, False)
    string = is_text(attributes.get("string"), schema.get(name))
    arguments.pop(name, None)  # the open one is the last
    arguments[name] = Value(plain(without_cut_tag(text)) if string else "", string)
    return CutCall(invoke.name, arguments, True)


def in_words(call: Call) -> str:
    return f"{call.name}({without_tags(call.arguments_json)})"


@dataclass
class _Invoke:
    """One call as written. `whole`: its end tag is there; `broken`: a value lacks its begin or end tag."""

    name: str
    start: int
    end: int = 0
    whole: bool = False
    broken: bool = False
    open: tuple[dict[str, str], str] | None = None  # attributes and text of a value that has no end
    beside: list[str] = field(default_factory=list[str])  # text outside values
    values: list[tuple[dict[str, str], str]] = field(default_factory=list[tuple[dict[str, str], str]])

    def body(self, block: str) -> str:
        return block[self.start : self.end]


def _parts(block: str) -> Iterator[str | _Invoke]:
    """Calls of a block and the text between them, in order."""
    place, inside, value = 0, cast(Inside, None), 0
    invoke: _Invoke | None = None
    attributes: dict[str, str] = {}
    for tag in TAG.finditer(block):
        after = inside_after(inside, tag)
        if tag["kind"] not in KINDS or (inside == "parameter" == after and tag["kind"] != "parameter"):
            continue  # plain text, maybe inside a value
        if invoke is None:
            yield block[place : tag.start()]
        elif inside == "parameter":
            if tag["kind"] == "parameter" and tag["slash"]:
                invoke.values.append((attributes, block[value : tag.start()]))
            else:
                invoke.broken = True
        else:
            invoke.beside.append(block[place : tag.start()])
            invoke.broken |= tag["kind"] == "parameter" and bool(tag["slash"])  # an end tag without its begin tag
        if invoke is not None and (tag["kind"] == "invoke" or ends_block(inside, tag)):
            invoke.end, invoke.whole = tag.start(), tag["kind"] == "invoke" and bool(tag["slash"])
            yield invoke
            invoke, after = None, after if tag["kind"] == "invoke" else None
        place, inside = tag.end(), after
        if tag["kind"] == "invoke" and not tag["slash"]:
            invoke = _Invoke(attributes_of(tag).get("name", ""), tag.end())
            if tag["empty"]:
                invoke.end, invoke.whole = tag.end(), True
                yield invoke
                invoke = None
        elif tag["kind"] == "parameter" and not tag["slash"]:
            attributes, value = attributes_of(tag), tag.end()
            if tag["empty"] and invoke is not None:
                invoke.values.append((attributes, ""))
    if invoke is None:
        yield block[place:]
    else:
        invoke.beside.append(block[place:])
        if inside == "parameter":
            invoke.open, invoke.broken = None if invoke.broken else (attributes, block[value:]), True
        invoke.end = len(block)
        yield invoke


def _arguments(invoke: _Invoke, schema: Schema) -> tuple[str, Arguments] | None:
    """(text outside the arguments, arguments) of a call; None if they are ambiguous."""
    left = "".join(invoke.beside)
    if invoke.broken or not is_name(invoke.name):
        return None
    if not invoke.values and left.strip():
        fence = _FENCE.fullmatch(left)
        members = read_object(fence[1] if fence else left)
        return None if members is None else ("", members)
    if MARK in left:
        return None  # part of a tag: an argument may be lost with it
    arguments: Arguments = {}
    for attributes, text in invoke.values:
        name = attributes.get("name", "")
        if not is_name(name):
            return None
        arguments[name] = read_value(text, attributes.get("string"), schema.get(plain(name)))
    return left.strip(), arguments
