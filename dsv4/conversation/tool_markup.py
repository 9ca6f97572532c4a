"""Tool markup of an answer, normalized to the one form that deepseek-recipe parses, or turned into plain text.

deepseek-recipe parses token by token: malformed markup would become a call with empty or wrong arguments before it
could be repaired. Here everything from a markup tag on is held back until the block of calls is complete, in reasoning
too: a call there ends the reasoning. A well-formed block passes through as its original tokens. In any other block,
each call that can be parsed is rewritten; the rest becomes text without tags, never a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.conversation.tool_arguments import Schema
from dsv4.conversation.tool_calls import Call, in_words, understand, write
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
    possible_beginning,
)
from dsv4.engine.outputs import Alternatives

THINK_END = "</think>"
_STOPS = re.compile(rf"</?{MARK}|{THINK_END}")
_BEGINNINGS = (*OPENINGS, THINK_END)
_LONGEST = max(map(len, _BEGINNINGS)) - 1


@dataclass(slots=True)
class Token:
    """One sampled token, its text, and its log-probabilities if requested."""

    token_id: int
    text: str
    logprobs: tuple[float, Alternatives] | None = None


@dataclass(frozen=True)
class Text:
    """Text in place of `num_tokens` tokens."""

    text: str
    num_tokens: int


class ToolMarkup:
    """Passes the tokens of one answer through, or puts text in their place.

    `tools`: parameter properties by tool name; None if no tools are offered, so that calls become plain text.
    `in_block`: True if the prompt has opened the block of calls. `in_thinking`: True if the answer begins with
    reasoning.
    """

    def __init__(self, tools: Mapping[str, Schema] | None, in_block: bool, in_thinking: bool) -> None:
        self._tools = tools
        self._prefix = BLOCK + "\n" if in_block else ""  # the part of the block that the prompt wrote
        self._in_block, self._in_thinking = in_block, in_thinking
        self._inside: Inside = None  # the open element of the block
        self._held: list[Token | Text] = []
        self._tail = ""  # the end of the held text, not scanned yet
        self._looked = 0  # characters of the held text before the tail
        self._end = ""  # of the text that was handed on
        self.calls: list[Call] = []  # of complete blocks

    def push(self, token: Token) -> list[Token | Text]:
        """Adds a token; returns the items that are now certain."""
        if not (self._held or self._in_block or "<" in token.text):  # most tokens: no tag begins in them
            self._end = (self._end + token.text)[-_LONGEST:]
            return [token]
        self._held.append(token)
        self._tail += token.text
        out: list[Token | Text] = []
        while self._step(out):
            pass
        return out

    def finish(self, truncated: bool) -> list[Token | Text]:
        """Remaining items. `truncated`: the answer was cut off, so a call without its end tag does not count."""
        out: list[Token | Text] = []
        if self._in_block or CUT_TAG.match(self._tail):
            self._end_block(len(self._tail), truncated, out)
        self._say(self._take(len(self._tail)), out)
        return out

    def _step(self, out: list[Token | Text]) -> bool:
        """Handles the next tag or end of thinking. True if there may be another."""
        stop = _STOPS.search(self._tail)
        if stop is None:
            clear = len(self._tail) - possible_beginning(self._tail, _BEGINNINGS)
            if self._in_block:
                self._look_past(clear)
            else:
                self._say(self._take(clear, whole=True), out)
            return False
        if not self._in_block:
            self._say(self._take(stop.start()), out)
        else:
            self._look_past(stop.start())
        if stop[0] == THINK_END:
            self._end_thinking(out)
            return True
        tag = TAG.match(self._tail)
        if tag is None and CUT_TAG.match(self._tail):
            return False  # it may still become a tag
        if self._in_block:
            self._go_on(tag, len(stop[0]), out)
        elif tag is not None and not tag["slash"] and tag["kind"] in (*BLOCK_KINDS, "invoke", "parameter"):
            self._in_block, self._inside = True, None
        else:  # a tag of unknown kind, or a mark in plain text
            self._drop(len(stop[0]) if tag is None else tag.end(), out)
        return True

    def _go_on(self, tag: re.Match[str] | None, mark_length: int, out: list[Token | Text]) -> None:
        """Moves past a tag of the block, or past a mark that forms no tag (`tag` None)."""
        if tag is not None and ends_block(self._inside, tag):
            self._end_block(tag.end(), False, out)
            return
        if tag is not None:
            self._inside = inside_after(self._inside, tag)
        self._look_past(mark_length if tag is None else tag.end())

    def _end_thinking(self, out: list[Token | Text]) -> None:
        """Moves past an end of thinking. It ends a block begun in reasoning, unless a call is open."""
        if self._in_block and self._in_thinking and self._inside is None:
            self._end_block(0, False, out)
        if self._in_block:
            self._look_past(len(THINK_END))
        else:
            if not self._in_thinking:  # a stray one, which deepseek-recipe drops
                self._say([Text(self._apart(""), 0)], out)
            self._in_thinking = False
            self._say(self._take(len(THINK_END)), out)

    def _end_block(self, end: int, truncated: bool, out: list[Token | Text]) -> None:
        """Emits the block, which ends at `end` of the tail: its tokens, a rewritten block, or plain text."""
        prefix = self._prefix
        held = self._take(end)
        block = prefix + "".join(item.text for item in held)
        self._in_block, self._inside, self._prefix = False, None, ""
        said, calls = understand(block, self._tools or {}, truncated)
        if self._tools is None:
            said = "\n".join([*filter(None, [said]), *map(in_words, calls)])
            calls = []
        self.calls += calls
        written = write(calls) if calls else ""
        if calls and not said and written == block.strip():
            self._say([Text(prefix, 0), *held] if prefix else held, out)
        else:
            self._say([Text(self._apart(said) + written, _num_tokens(held))], out)

    def _drop(self, end: int, out: list[Token | Text]) -> None:
        """Drops the text before `end` of the tail; its tokens still count."""
        self._say([Text(self._apart(""), _num_tokens(self._take(end)))], out)

    def _apart(self, text: str) -> str:
        """Text in place of markup, spaced so that it forms no tag with what stands around it."""
        if any(opening in self._end + text for opening in OPENINGS):
            text = " " + text
        return text + " " if possible_beginning(self._end + text, OPENINGS) else text

    def _say(self, items: list[Token | Text], out: list[Token | Text]) -> None:
        out += items
        self._end = (self._end + "".join(item.text for item in items))[-_LONGEST:]

    def _look_past(self, end: int) -> None:
        self._tail = self._tail[end:]
        self._looked += end

    def _take(self, end: int, whole: bool = False) -> list[Token | Text]:
        """Takes the held items up to `end` of the tail; a token across `end` is cut in two, or stays if `whole`."""
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
