"""Tool markup of an answer, put into the one form that deepseek-recipe parses, or told in plain text.

deepseek-recipe parses while tokens come, so that malformed markup has become a call, with empty or wrong arguments,
before anything can be done about it. Here what begins with a markup tag is held back until the block of calls is
complete, in reasoning too: a call there ends the reasoning. A well-formed block goes on as the tokens that it came in.
Of any other each call that can be understood is written anew, and what cannot be is text without tags: never a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.conversation.tool_arguments import Schema
from dsv4.conversation.tool_calls import in_words, understand, write
from dsv4.conversation.tool_tags import (
    BLOCK,
    BLOCK_KINDS,
    CUT_TAG,
    MARK,
    OPENINGS,
    TAG,
    Inside,
    ends_block,
    inside_after,
)
from dsv4.engine.outputs import Alternatives

THINK_END = "</think>"
_STOPS = re.compile(rf"</?{MARK}|{THINK_END}")
_BEGINNINGS = (*OPENINGS, THINK_END)


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


class ToolMarkup:
    """Takes the tokens of one answer and gives them back, or text in their place.

    `tools`: properties by tool name; None where no tools are offered, so that a call is told in plain text.
    `in_block`: the prompt has opened the block of calls. `in_thinking`: the answer begins with reasoning.
    """

    def __init__(self, tools: Mapping[str, Schema] | None, in_block: bool, in_thinking: bool) -> None:
        self._tools = tools
        self._prefix = BLOCK + "\n" if in_block else ""  # of the block, written by the prompt
        self._in_block, self._in_thinking = in_block, in_thinking
        self._inside: Inside = None  # the element of the block that is open
        self._held: list[Token | Text] = []
        self._tail = ""  # the end of the held text that has not been looked through
        self._looked = 0  # characters of the held text before it

    def push(self, token: Token) -> list[Token | Text]:
        """What can be handed on after one more token."""
        self._held.append(token)
        self._tail += token.text
        out: list[Token | Text] = []
        while self._step(out):
            pass
        return out

    def finish(self, truncated: bool) -> list[Token | Text]:
        """The rest. `truncated`: the answer was cut off, so a call without its end is none."""
        out: list[Token | Text] = []
        if self._in_block or CUT_TAG.match(self._tail):
            self._end_block(len(self._tail), truncated, out)
        out += self._take(len(self._tail))
        return out

    def _step(self, out: list[Token | Text]) -> bool:
        """Looks at the next tag, or end of thinking. True if there may be more to do."""
        stop = _STOPS.search(self._tail)
        if stop is None:
            clear = len(self._tail) - _possible_beginning(self._tail)
            if self._in_block:
                self._look_past(clear)
            else:
                out += self._take(clear, whole=True)
            return False
        if not self._in_block:
            out += self._take(stop.start())
        else:
            self._look_past(stop.start())
        if stop[0] == THINK_END:
            self._end_thinking(out)
            return True
        tag = TAG.match(self._tail)
        if tag is None and CUT_TAG.match(self._tail):
            return False  # it may still become one
        if self._in_block:
            self._go_on(tag, len(stop[0]), out)
        elif tag is not None and not tag["slash"] and tag["kind"] in (*BLOCK_KINDS, "invoke", "parameter"):
            self._in_block, self._inside = True, None
        else:  # a tag of nothing, or a mark in a text
            self._drop(len(stop[0]) if tag is None else tag.end(), out)
        return True

    def _go_on(self, tag: re.Match[str] | None, mark_length: int, out: list[Token | Text]) -> None:
        """Past a tag of the block, or past a mark that is none."""
        if tag is not None and ends_block(self._inside, tag):
            self._end_block(tag.end(), False, out)
            return
        if tag is not None:
            self._inside = inside_after(self._inside, tag)
        self._look_past(mark_length if tag is None else tag.end())

    def _end_thinking(self, out: list[Token | Text]) -> None:
        """Past an end of thinking. It ends a block that reasoning began, but for one in the middle of a call."""
        if self._in_block and self._in_thinking and self._inside is None:
            self._end_block(0, False, out)
        if self._in_block:
            self._look_past(len(THINK_END))
        else:
            self._in_thinking = False
            out += self._take(len(THINK_END))

    def _end_block(self, end: int, truncated: bool, out: list[Token | Text]) -> None:
        """Hands on the block, which ends at `end` of the tail, as it came, written anew or in words."""
        prefix = self._prefix
        held = self._take(end)
        block = prefix + "".join(item.text for item in held)
        self._in_block, self._inside, self._prefix = False, None, ""
        said, calls = understand(block, self._tools or {}, truncated)
        if self._tools is None:
            said = "\n".join([*filter(None, [said]), *map(in_words, calls)])
            calls = []
        written = write(calls) if calls else ""
        if calls and not said and written == block.strip():
            out += [Text(prefix, 0), *held] if prefix else held
        else:
            out.append(Text(said + written, _num_tokens(held)))

    def _drop(self, end: int, out: list[Token | Text]) -> None:
        """Takes the tail's beginning and hands on none of its text; its tokens count."""
        out.append(Text("", _num_tokens(self._take(end))))

    def _look_past(self, end: int) -> None:
        self._tail = self._tail[end:]
        self._looked += end

    def _take(self, end: int, whole: bool = False) -> list[Token | Text]:
        """Takes what is held up to `end` of the tail; a token across it is cut in two, or stays if `whole`."""
        end += self._looked
        place, count = 0, 0
        while count < len(self._held) and place + len(self._held[count].text) <= end:
            place += len(self._held[count].text)
            count += 1
        taken, self._held = self._held[:count], self._held[count:]
        if place < end and not whole:
            across = self._held[0]
            taken.append(Text(across.text[: end - place], _num_tokens([across])))
            self._held[0] = Text(across.text[end - place :], 0)
            place = end
        self._tail = self._tail[place - self._looked :]
        self._looked = 0
        return taken


def _num_tokens(items: list[Token | Text]) -> int:
    return sum(1 if isinstance(item, Token) else item.num_tokens for item in items)


def _possible_beginning(text: str) -> int:
    """Characters at the end of a text that a tag of markup or the end of thinking may begin with."""
    longest = max(map(len, _BEGINNINGS)) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(b.startswith(text[-n:]) for b in _BEGINNINGS)), 0
    )
