"""Tool markup of an answer, put into the one form that deepseek-recipe parses, or told in plain text.

deepseek-recipe parses while tokens come, so that malformed markup has become a call, with empty or wrong arguments,
before anything can be done about it. Here whatever begins with a markup tag is held back until the block of calls is
complete. A well-formed block goes on as the tokens that it came in. Of any other each call that can be understood is
written anew, and what cannot be is text without tags: it is never a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from dsv4.engine.outputs import Alternatives

MARK = "｜DSML｜"
THINK_END = "</think>"
_OPENINGS = (f"<{MARK}", f"</{MARK}")
_BLOCK, _BLOCK_END = f"<{MARK}tool_calls>", f"</{MARK}tool_calls>"
_TAG = re.compile(rf"</?{MARK}[^>]*(?:>|$)")
_INVOKE = re.compile(
    rf"<{MARK}invoke(?P<attributes>[^>]*)>(?P<body>.*?)(?P<end></{MARK}invoke>|(?=<{MARK}invoke)|(?={_BLOCK_END})|$)",
    re.S,
)
_PARAMETER = re.compile(rf"<{MARK}parameter(?P<attributes>[^>]*)>(?P<value>.*?)</{MARK}parameter>", re.S)
_ATTRIBUTE = re.compile(r'(\w+)\s*=\s*"([^"]*)"')
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.S)
_WRAPPERS = ("arguments", "parameters", "input")

Schema = Mapping[str, Any]  # the properties of a tool's parameters
Arguments = dict[str, "Value"]


@dataclass(frozen=True)
class Token:
    """One sampled token, its text, and the log-probabilities that were asked for."""

    token_id: int
    text: str
    logprobs: tuple[float, Alternatives] | None = None


@dataclass(frozen=True)
class Text:
    """Text that `num_tokens` tokens became."""

    text: str
    num_tokens: int


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


class ToolMarkup:
    """Takes the tokens of one answer and gives them back, or text in their place.

    `tools`: properties by tool name; None where no tools are offered, so that a call is told in plain text.
    `in_block`: the prompt has opened the block of calls. `in_thinking`: the answer begins with reasoning, which is left
    as it is.
    """

    def __init__(self, tools: Mapping[str, Schema] | None, in_block: bool, in_thinking: bool) -> None:
        self._tools = tools
        self._prefix = _BLOCK + "\n" if in_block else ""  # of the block, written by the prompt
        self._in_block, self._in_thinking = in_block, in_thinking
        self._tail = ""  # of the reasoning
        self._held: list[Token | Text] = []
        self._text = ""  # of what is held

    def push(self, token: Token) -> list[Token | Text]:
        """What can be handed on after one more token."""
        if self._in_thinking:
            self._tail = (self._tail + token.text)[-(len(token.text) + len(THINK_END)) :]
            self._in_thinking = THINK_END not in self._tail
            return [token]
        self._held.append(token)
        self._text += token.text
        out: list[Token | Text] = []
        while self._step(out):
            pass
        return out

    def finish(self, truncated: bool) -> list[Token | Text]:
        """The rest. `truncated`: the answer was cut off, so a call without its end is none."""
        out: list[Token | Text] = []
        if self._in_block:
            self._end_block(len(self._text), truncated, out)
        out += self._take(len(self._text))
        return out

    def _step(self, out: list[Token | Text]) -> bool:
        """Hands on what is decided. True if there may be more to do."""
        if self._in_block:
            end = self._text.find(_BLOCK_END)
            if end < 0:
                return False
            self._end_block(end + len(_BLOCK_END), False, out)
            return True
        found = [place for opening in _OPENINGS if (place := self._text.find(opening)) >= 0]
        if found:
            out += self._take(min(found))
            self._in_block = True
            return True
        out += self._take(len(self._text) - _possible_opening(self._text), whole=True)
        return False

    def _end_block(self, end: int, truncated: bool, out: list[Token | Text]) -> None:
        block, prefix = self._prefix + self._text[:end], self._prefix
        held = self._take(end)
        self._in_block, self._prefix = False, ""
        said, calls = understand(block, self._tools or {}, truncated)
        if self._tools is None:
            said = "\n".join([*filter(None, [said]), *map(_in_words, calls)])
            calls = []
        written = write(calls) if calls else ""
        if calls and not said and written == block.strip():
            out += [Text(prefix, 0), *held] if prefix else held
        else:
            out.append(Text(said + written, sum(1 if isinstance(h, Token) else h.num_tokens for h in held)))

    def _take(self, end: int, whole: bool = False) -> list[Token | Text]:
        """Takes what is held up to `end` of its text; a token across it is cut in two, or stays if `whole`."""
        taken: list[Token | Text] = []
        place = 0
        while self._held and place + len(self._held[0].text) <= end:
            place += len(self._held[0].text)
            taken.append(self._held.pop(0))
        if place < end and not whole:
            across = self._held[0]
            count = 1 if isinstance(across, Token) else across.num_tokens
            taken.append(Text(across.text[: end - place], count))
            self._held[0] = Text(across.text[end - place :], 0)
            place = end
        self._text = self._text[place:]
        return taken


def understand(block: str, tools: Mapping[str, Schema], truncated: bool) -> tuple[str, list[Call]]:
    """A block of markup -> (text that is no call, without tags, and the calls in it)."""
    said: list[str] = []
    calls: list[Call] = []
    end = 0
    for invoke in _INVOKE.finditer(block):
        said.append(block[end : invoke.start()])
        end = invoke.end()
        name = dict(_ATTRIBUTE.findall(invoke["attributes"])).get("name", "")
        whole = bool(invoke["end"])
        schema = tools.get(name, {})
        left, arguments = _arguments(invoke["body"], schema) if name and (whole or not truncated) else ("", None)
        if arguments is None or not (arguments or whole):
            said.append(invoke["body"])
        else:
            said.append(left)
            calls.append(Call(name, _unwrapped(name, arguments, schema)))
    said.append(block[end:])
    texts = [_TAG.sub("", text).strip() for text in said]
    return "\n".join(filter(None, texts)), calls


def write(calls: list[Call]) -> str:
    """The calls in the form that the prompts teach."""
    lines = [_BLOCK]
    for call in calls:
        lines.append(f'<{MARK}invoke name="{call.name}">')
        lines += [
            f'<{MARK}parameter name="{name}" string="{str(value.is_string).lower()}">{value.text}</{MARK}parameter>'
            for name, value in call.arguments.items()
        ]
        lines.append(f"</{MARK}invoke>")
    return "\n".join([*lines, _BLOCK_END])


def _in_words(call: Call) -> str:
    inner = ", ".join(f"{json.dumps(name)}: {value.json}" for name, value in call.arguments.items())
    return f"{call.name}({{{inner}}})"


def _arguments(body: str, schema: Schema) -> tuple[str, Arguments | None]:
    """(text beside the arguments, the arguments) of a call's body; None where they cannot be told."""
    arguments: Arguments = {}
    for parameter in _PARAMETER.finditer(body):
        attributes = dict(_ATTRIBUTE.findall(parameter["attributes"]))
        if "name" not in attributes or MARK in parameter["value"]:
            return "", None
        arguments[attributes["name"]] = _value(
            parameter["value"], attributes.get("string"), schema.get(attributes["name"])
        )
    left = _PARAMETER.sub("", body)
    if MARK in left:
        return "", None
    if arguments or not left.strip():
        return left.strip(), arguments
    fence = _FENCE.fullmatch(left)
    return "", _members(fence[1] if fence else left)


def _value(text: str, is_string: str | None, schema: object) -> Value:
    """An argument as its markup says, or where it does not say, as the schema does; what is no JSON is a string."""
    kind = cast(Schema, schema).get("type") if isinstance(schema, Mapping) else None
    if is_string == "true" or (is_string != "false" and kind == "string"):
        return Value(text, True)
    return Value(text, not _is_json(text))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _members(text: str) -> Arguments | None:
    """The members of a JSON object, each with the JSON text of its value: a number keeps all its digits."""
    if not _is_json(text) or not text.lstrip().startswith("{"):
        return None
    found: Arguments = {}
    for name, value in _raw_members(text.strip()):
        if '"' in name or ">" in name or MARK in value:
            return None
        found[name] = Value(value, False)
    return found


def _raw_members(text: str) -> Iterator[tuple[str, str]]:
    decoder, place = json.JSONDecoder(), 1
    while text[place:].lstrip()[0] != "}":
        place = text.index('"', place)
        name, place = decoder.raw_decode(text, place)
        place = text.index(":", place) + 1
        place += len(text[place:]) - len(text[place:].lstrip())
        _, end = decoder.raw_decode(text, place)
        yield name, text[place:end]
        rest = text[end:].lstrip()
        place = len(text) - len(rest) + (rest[0] == ",")


def _unwrapped(name: str, arguments: Arguments, schema: Schema) -> Arguments:
    """Arguments that came inside one more object, where the schema knows the inner names and not the outer one."""
    outer = {key: value for key, value in arguments.items() if key != "name" or "name" in schema}
    if len(outer) != 1 or (len(outer) < len(arguments) and arguments["name"].json != json.dumps(name)):
        return arguments
    ((key, value),) = outer.items()
    if key not in _WRAPPERS or key in schema:
        return arguments
    inner = _members(value.text)
    return inner if inner is not None and inner.keys() <= schema.keys() else arguments


def _possible_opening(text: str) -> int:
    """Characters at the end of a text that a tag of markup may begin with."""
    longest = max(map(len, _OPENINGS)) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(o.startswith(text[-n:]) for o in _OPENINGS)), 0
    )
