"""TurnRecorder: collects what is sampled for one answer, and keeps it for the next prompt."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence

from dsv4.conversation.said_turns import SaidTurn, SaidTurns, turn_key
from dsv4.conversation.tool_calls import Call
from dsv4.conversation.tool_tags import BLOCK
from dsv4.conversation.turn import Turn
from dsv4.conversation.vocabulary import Vocabulary
from dsv4.tokenizer.special import ASSISTANT, END_THINK, THINK

# In every format; within a text of the answer the quotes would be escaped.
_CALL_ID = re.compile(r'"(?:call_)?id":\s*"(call_[^"\\]+)"')


class TurnRecorder:
    """Tokens and text of one answer, in their order.

    `call_ids`: of the answer's calls, as the client gets them.
    """

    def __init__(self, said: SaidTurns, owner: str, turn: Turn, vocabulary: Vocabulary) -> None:
        self._said, self._owner, self._turn, self._vocabulary = said, owner, turn, vocabulary
        self._token_ids = array("i")
        self._texts: list[str] = []
        self._call_ids: dict[str, None] = {}

    def add_token(self, token_id: int) -> None:
        self._token_ids.append(token_id)

    def add_text(self, text: str) -> None:
        """Text that is shown, with markup of calls in the form in which they are parsed."""
        self._texts.append(text)

    def find_call_ids(self, chunks: Sequence[str]) -> None:
        """Reads the ids of calls in an answer's chunks."""
        self._call_ids |= dict.fromkeys(call_id for chunk in chunks for call_id in _CALL_ID.findall(chunk))

    def keep(self, calls: Sequence[Call]) -> None:
        """Keeps the turn, which has ended with these calls."""
        begun = self._begun()
        hidden = self._vocabulary.is_hidden
        token_ids = self._token_ids
        while token_ids and hidden(token_ids[-1]):
            token_ids.pop()
        if begun is None or len(calls) != len(self._call_ids) or any(map(hidden, token_ids)):
            return
        thinking, head = begun
        reasoning, content = _parted("".join(self._texts), thinking)
        call_ids = tuple(self._call_ids)
        turn = SaidTurn(array("i", head) + token_ids, thinking, reasoning, content, tuple(calls), call_ids)
        self._said.keep(self._owner, turn_key(self._turn.history, content, call_ids), turn)

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


def _parted(text: str, thinking: bool) -> tuple[str, str]:
    """(reasoning, content) of a turn's text, without its calls. A call in reasoning ends that."""
    text = text.partition(BLOCK)[0]
    if not thinking:
        return "", text
    reasoning, _, content = text.partition(END_THINK)
    return reasoning, content
