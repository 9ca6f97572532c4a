"""TurnRecorder: collects what is sampled for one answer, and keeps it for the next prompt."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence

from dsv4.conversation.said_turns import SaidTurn, SaidTurns, turn_key
from dsv4.conversation.tool_markup import Text, Token, ToolMarkup
from dsv4.conversation.tool_tags import BLOCK, MARK
from dsv4.conversation.turn import Turn
from dsv4.conversation.vocabulary import Vocabulary
from dsv4.tokenizer.special import ASSISTANT, END_THINK, THINK

_SPECIAL = re.compile(rf"(?<=<){MARK}|(?<=</){MARK}|{END_THINK}")  # in text that a parser reads


class TurnRecorder:
    """Tokens and text of one answer, in their order.

    `call_ids`: of the answer's calls, as the client gets them.
    """

    def __init__(self, said: SaidTurns, owner: str, turn: Turn, vocabulary: Vocabulary) -> None:
        self._said, self._owner, self._turn, self._vocabulary = said, owner, turn, vocabulary
        self._token_ids = array("i")
        self._texts: list[str] = []
        self._length = 0  # of the texts
        self._marks: list[tuple[int, int]] = []  # places of special tokens in the texts
        self._call_ids: list[str] = []
        marks = vocabulary.marks  # without those that the tokenizer lacks
        ids = ((marks.tag, MARK), (marks.thinking_ends, END_THINK))
        self._specials = {token_id: spelling for token_id, spelling in ids if token_id is not None}

    def add_token(self, token_id: int) -> None:
        self._token_ids.append(token_id)

    def add_item(self, item: Token | Text) -> None:
        """Text of the answer for the parser: shown text, and calls in the form in which they are parsed."""
        text = item.text
        if isinstance(item, Token):
            spelling = self._specials.get(item.token_id)
            places = [] if spelling is None else [(len(text) - len(spelling), len(text))]
        else:
            found = (match.span() for match in _SPECIAL.finditer(text))
            places = [(start, stop) for start, stop in found if text[start:stop] in self._specials.values()]
        self._marks += [(self._length + start, self._length + stop) for start, stop in places]
        self._texts.append(text)
        self._length += len(text)

    def add_call_ids(self, call_ids: Sequence[str]) -> None:
        self._call_ids += call_ids

    def keep(self, markup: ToolMarkup, cut: bool) -> None:
        """Keeps the turn, which has ended. `cut`: the limit of tokens has ended it."""
        begun = self._begun()
        hidden = self._vocabulary.is_hidden
        token_ids, calls = self._token_ids, markup.calls
        while token_ids and hidden(token_ids[-1]):
            token_ids.pop()
        if begun is None or len(calls) + markup.cut_call != len(self._call_ids) or any(map(hidden, token_ids)):
            return
        thinking, head = begun
        shown = "".join(self._texts)
        block = self._block(shown)
        # In a block of calls an end of reasoning is part of a value.
        self._marks = [(a, b) for a, b in self._marks if a < block or not shown.startswith(END_THINK, a)]
        reasoning, content = self._parted(shown[:block], thinking)
        call_ids = tuple(self._call_ids)
        said = array("i", head) + token_ids
        if cut or markup.reworded:  # the next prompt shows what the client has seen
            said = self._closed(said, shown, bool(calls), thinking)
        turn = SaidTurn(said, thinking, reasoning, content, tuple(calls), call_ids)
        self._said.keep(self._owner, turn_key(self._turn.history, content, call_ids), turn)

    def _closed(self, said: array[int], shown: str, has_calls: bool, thinking: bool) -> array[int]:
        """Tokens of a turn that was cut off, closed as one that has ended.

        They are those that were sampled, as far as they say what was shown, special tokens for special ones; then the
        rest of that (the ends of a block of calls, or the text in place of a call that is not whole), and the end of
        reasoning.
        """
        tokenizer = self._vocabulary.tokenizer
        before = ""
        if has_calls and self._turn.parsing.starts_in_tool_calls:  # the prompt wrote what precedes the block
            before = tokenizer.decode(said).partition(BLOCK)[0]
            shown = before + shown
        decoder = tokenizer.decode_stream()
        ends = {len(before) + stop for _, stop in self._marks}
        count, place, length = 0, 0, 0
        for number, token_id in enumerate(said, start=1):
            text = decoder.push(token_id)
            stop = length + len(text)
            is_other = stop > len(before) and text and (token_id in self._specials) != (stop in ends)
            if is_other or not shown.startswith(text, length):
                break
            length += len(text)
            if text:  # of whole characters
                count, place = number, length
        moved = len(before) - place
        marks = [(start + moved, stop + moved) for start, stop in self._marks if start + moved >= 0]
        closed = said[:count]
        closed.extend(tokenizer.encode_rendered(shown[place:], marks))
        if thinking and not has_calls and not any(shown.startswith(END_THINK, start) for start, _ in self._marks):
            closed.append(tokenizer.special_id(END_THINK))
        return closed

    def _begun(self) -> tuple[bool, list[int]] | None:
        """(whether the prompt's end began reasoning, what it wrote of the turn); None if it wrote text or reasoning."""
        prompt, tokenizer = self._turn.prompt_token_ids, self._vocabulary.tokenizer
        marks = {tokenizer.special_id(THINK): True, tokenizer.special_id(END_THINK): False}
        assistant = tokenizer.special_id(ASSISTANT)
        place = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == assistant), len(prompt))
        if place + 1 >= len(prompt) or prompt[place + 1] not in marks:
            return None
        head = prompt[place + 2 :]
        if head and not self._turn.parsing.starts_in_tool_calls:
            return None
        return marks[prompt[place + 1]], head

    def _block(self, shown: str) -> int:
        """Start of the block of calls in a turn's text, or the text's end."""
        if self._vocabulary.marks.tag is None:  # spelled, of calls alone
            return shown.index(BLOCK) if self._call_ids and BLOCK in shown else len(shown)
        return next((start - 1 for start, _ in self._marks if shown.startswith(BLOCK, start - 1)), len(shown))

    def _parted(self, text: str, thinking: bool) -> tuple[str, str]:
        """(reasoning, content) of a turn's text before its calls. A call in reasoning ends that."""
        if not thinking:
            return "", text
        end = next((start for start, _ in self._marks if text.startswith(END_THINK, start)), len(text))
        return text[:end], text[end + len(END_THINK) :]
