"""Tool markup of an answer, normalized to the one form that deepseek-recipe parses, or turned into plain text.

deepseek-recipe parses token by token: malformed markup would become a call with empty or wrong arguments before it
could be repaired. Here everything from a markup tag on is held back, in reasoning too: a call there ends the reasoning.
A well-formed call passes as its original tokens once its end tag is there, the rest of a block once that is complete:
each call that can be parsed is rewritten; anything else becomes text without tags, never a call. An answer ends with
its block of calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dsv4.conversation.tool_arguments import Schema
from dsv4.conversation.tool_calls import Call, CutCall, End, Understood, in_words, understand, write
from dsv4.conversation.tool_tags import (
    BLOCK,
    BLOCK_KINDS,
    CUT_TAG,
    MARK,
    OPENINGS,
    TAG,
    THINKING_ENDS,
    Inside,
    Marks,
    ends_block,
    inside_after,
    possible_beginning,
    spelled,
)
from dsv4.engine.outputs import Alternatives
from dsv4.tokenizer.special import END_THINK

_STOPS = {ends: re.compile(rf"</?{MARK}|{ends}") for ends in (END_THINK, THINKING_ENDS)}
_LONGEST = max(map(len, (*OPENINGS, END_THINK))) - 1


@dataclass(slots=True)
class Token:
    """One sampled token, its text, and its log-probabilities if requested."""

    token_id: int
    text: str
    logprobs: tuple[float, Alternatives] | None = None


@dataclass(frozen=True)
class Text:
    """Text in place of `num_tokens` tokens, in which spellings of special tokens are these."""

    text: str
    num_tokens: int


@dataclass(slots=True)
class _Piece:
    """A token, a part of one, or text in place of tokens. `text`: as markup is read from it."""

    text: str
    num_tokens: int
    token: Token | None = None

    def item(self) -> Token | Text:
        return self.token or Text(spelled(self.text), self.num_tokens)


class ToolMarkup:
    """Passes the tokens of one answer through, or puts text in their place.

    `tools`: parameter properties by tool name; None if no tools are offered, so that calls become plain text.
    `in_block`: True if the prompt has opened the block of calls. `in_thinking`: True if the answer begins with
    reasoning. `marks`: tokens of which tags are made; None for a tokenizer without them, where spellings count.
    `has_form`: what follows the reasoning is JSON or of a regex, in which nothing begins a tag. `cut_form`: of a call
    in which the model has stopped.
    """

    def __init__(
        self,
        tools: Mapping[str, Schema] | None,
        in_block: bool,
        in_thinking: bool,
        marks: Marks | None = None,
        has_form: bool = False,
        cut_form: Callable[[CutCall], Call] = CutCall.unreadable,
    ) -> None:
        self._tools, self._marks = tools, marks
        self._has_form, self._cut_form = has_form, cut_form
        self._think_end = END_THINK if marks is None else THINKING_ENDS
        self._beginnings = (*OPENINGS, self._think_end)
        self._prefix = BLOCK + "\n" if in_block else ""  # the part of the block that the prompt wrote
        self._in_block, self._in_thinking = in_block, in_thinking
        self._inside: Inside = None  # the open element of the block
        self._begun = False  # calls of the block have been handed on
        self._exact = True  # all of the block so far has
        self._held: list[_Piece] = []
        self._tail = ""  # the end of the held text, not scanned yet
        self._looked = 0  # characters of the held text before the tail
        self._end = ""  # of the text that was handed on
        self.calls: list[Call] = []  # whole ones that were handed on
        self.cut_call = False  # after them one in which the model has stopped
        self.complete = False  # a block of calls has ended the answer
        self.reworded = False  # markup was dropped, or text put in its place that is no call

    def push(self, token: Token) -> list[Token | Text]:
        """Adds a token; returns the items that are now certain, none after the answer's end."""
        if self.complete:
            return []
        idle = not (self._held or self._in_block)
        if idle and self._has_form and not self._in_thinking:  # nothing begins a tag
            return [token]
        text = token.text if self._marks is None else self._marks.read(token.token_id, token.text)
        if idle and not ("<" in text or THINKING_ENDS in text):  # most: no tag begins in them
            self._end = (self._end + text)[-_LONGEST:]
            return [token]
        self._held.append(_Piece(text, 1, token))
        self._tail += text
        out: list[_Piece] = []
        while not self.complete and self._step(out):
            pass
        return [piece.item() for piece in out]

    def finish(self, truncated: bool) -> list[Token | Text]:
        """Remaining items. `truncated`: the answer was cut off, so a call without its end tag does not count."""
        out: list[_Piece] = []
        if not self.complete and (self._in_block or CUT_TAG.match(self._tail)):
            self._end_block(len(self._tail), "length" if truncated else "stop", out)
        if not self.complete:
            self._say(self._take(len(self._tail)), out)
        return [piece.item() for piece in out]

    def _step(self, out: list[_Piece]) -> bool:
        """Handles the next tag or end of thinking. True if there may be another."""
        stop = _STOPS[self._think_end].search(self._tail)
        if stop is None:
            clear = len(self._tail) - possible_beginning(self._tail, self._beginnings)
            if self._in_block:
                self._look_past(clear)
            else:
                self._say(self._take(clear, whole=True), out)
            return False
        if not self._in_block:
            self._say(self._take(stop.start()), out)
        else:
            self._look_past(stop.start())
        if stop[0] == self._think_end:
            self._end_thinking(out)
            return True
        tag = TAG.match(self._tail)
        if tag is None and CUT_TAG.match(self._tail):
            return False  # it may still become a tag
        if self._in_block:
            self._go_on(tag, len(stop[0]), out)
        elif tag is not None and not tag["slash"] and tag["kind"] in (*BLOCK_KINDS, "invoke", "parameter"):
            self._in_block, self._exact = True, True
        else:  # a tag of unknown kind, or a mark in plain text
            self._drop(len(stop[0]) if tag is None else tag.end(), out)
        return True

    def _go_on(self, tag: re.Match[str] | None, mark_length: int, out: list[_Piece]) -> None:
        """Moves past a tag of the block, or past a mark that forms no tag (`tag` None)."""
        if tag is not None and ends_block(self._inside, tag):
            self._end_block(tag.end(), "block", out)
            return
        if tag is not None:
            self._inside = inside_after(self._inside, tag)
        self._look_past(mark_length if tag is None else tag.end())
        if tag is not None and tag["kind"] == "invoke" and self._inside is None:
            self._end_call(out)

    def _end_call(self, out: list[_Piece]) -> None:
        """Hands on the call that has just ended, if it is well-formed as is all of the block before it."""
        if self._tools is None or not self._exact:
            return
        text = self._prefix + "".join(piece.text for piece in self._held)[: self._looked]
        found = understand(text, self._tools, "block")
        self._exact = found.exact and write(found.calls, self._begun, end="") == text
        if self._exact:
            if self._prefix:
                self._say([_Piece(self._prefix, 0)], out)
            self._say(self._take(0), out)
            self.calls += [call.plain() for call in found.calls]
            self._begun, self._prefix = True, ""

    def _end_thinking(self, out: list[_Piece]) -> None:
        """Moves past an end of thinking. It ends a block begun in reasoning, unless a call is open.

        A form begins there in any case: it is the engine's constraint.
        """
        if self._in_block and self._in_thinking and (self._inside is None or self._has_form):
            self._end_block(0, "block", out)
        if self.complete:
            self._say([_Piece("", _num_tokens(self._take(len(self._think_end))))], out)
        elif self._in_block:
            self._look_past(len(self._think_end))
        else:
            if not self._in_thinking:  # a stray one, which deepseek-recipe drops
                self._say([_Piece(self._apart(""), 0)], out)
            self._in_thinking = False
            self._say(self._take(len(self._think_end)), out)

    def _end_block(self, end: int, how: End, out: list[_Piece]) -> None:
        """Emits what was held of the block, which ends at `end` of the tail: its tokens, rewritten calls, or text."""
        held = self._take(end)
        block = self._prefix + "".join(piece.text for piece in held)
        self._in_block, self._inside, self._prefix = False, None, ""
        if how == "stop" and (self._tools is None or (self._in_thinking and self._think_end in block)):
            how = "block"  # no call in which the model has stopped: it has ended its reasoning since
        found = understand(block, self._tools or {}, how)
        if self._tools is None:
            words = [_unended(in_words(call)) for call in found.calls]
            self._reword("\n".join([*filter(None, [self._text(found.said)]), *words]), held, out)
        elif not (self._begun or found.calls or found.cut):
            self._reword(self._text(found.said), held, out)
        else:
            self._end_calls(block, found, held, out)

    def _end_calls(self, block: str, found: Understood, held: list[_Piece], out: list[_Piece]) -> None:
        """Emits what was held of a block with calls, and ends the answer."""
        self.complete, self.cut_call = True, found.cut is not None
        if self._begun and block == write([], begun=True):
            self._say(held, out)
            return
        calls = [call.plain() for call in found.calls]
        written = write([*calls, self._cut_form(found.cut)] if found.cut else calls, self._begun)
        # The parser shows no text behind a call, as the hosted service.
        said = "" if self._begun or not found.said else self._apart(self._text(found.said) + "\n\n")
        self._say([_Piece(said + written, _num_tokens(held))], out)
        self.calls += calls
        self.reworded |= not (found.exact or (self._begun and not block.strip()))

    def _text(self, said: str) -> str:
        """Text of a block beside whole calls. An end of reasoning in it is one, unless it is only spelled."""
        self._in_thinking &= self._think_end not in said
        return said if self._marks is None else THINKING_ENDS.join(map(_unended, said.split(THINKING_ENDS)))

    def _reword(self, said: str, held: list[_Piece], out: list[_Piece]) -> None:
        """Puts text in place of markup."""
        self.reworded = True
        self._say([_Piece(self._apart(said), _num_tokens(held))], out)

    def _drop(self, end: int, out: list[_Piece]) -> None:
        """Drops the text before `end` of the tail; its tokens still count."""
        self._reword("", self._take(end), out)

    def _apart(self, text: str) -> str:
        """Text in place of markup, spaced so that it forms no tag with what stands around it."""
        if any(opening in self._end + text for opening in OPENINGS):
            text = " " + text
        return text + " " if possible_beginning(self._end + text, OPENINGS) else text

    def _say(self, pieces: list[_Piece], out: list[_Piece]) -> None:
        out += pieces
        self._end = (self._end + "".join(piece.text for piece in pieces))[-_LONGEST:]

    def _look_past(self, end: int) -> None:
        self._tail = self._tail[end:]
        self._looked += end

    def _take(self, end: int, whole: bool = False) -> list[_Piece]:
        """Takes the held pieces up to `end` of the tail; a token across `end` is cut in two, or stays if `whole`."""
        end += self._looked
        place, count = 0, 0
        while count < len(self._held) and place + len(self._held[count].text) <= end:
            place += len(self._held[count].text)
            count += 1
        taken, self._held = self._held[:count], self._held[count:]
        if place < end and not whole:
            across = self._held[0]
            taken.append(_Piece(across.text[: end - place], across.num_tokens))
            self._held[0] = _Piece(across.text[end - place :], 0)
            place = end
        self._tail = self._tail[place - self._looked :]
        self._looked = 0
        return taken


def _unended(text: str) -> str:
    """Text in which an end of reasoning is spelled so that it is none."""
    return text.replace(THINKING_ENDS, END_THINK).replace(END_THINK, f"{END_THINK[0]} {END_THINK[1:]}")


def _num_tokens(pieces: list[_Piece]) -> int:
    return sum(piece.num_tokens for piece in pieces)
