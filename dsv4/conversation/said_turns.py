"""SaidTurns: the model's own turns as it sampled them, so that later prompts repeat them exactly.

A client sends earlier turns back as it likes: calls as JSON that it has written anew, often without the reasoning. A
prompt made of that differs from what the model has read and written, and what is stored of the earlier prompt no longer
fits. A turn with calls is found by the id of its first call, any other by the conversation before it and its text.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import deepseek_recipe as recipe

    from dsv4.conversation.tool_calls import Call

MAX_BYTES = 64 << 20
_OVERHEAD = 1000  # bytes of a turn beside its tokens and texts


@dataclass(frozen=True)
class SaidTurn:
    """One turn of the model.

    `token_ids`: after the mark that begins reasoning or text, without the end of the turn. `thinking`: the mark began
    reasoning. `calls`: whole ones; the last of `call_ids` may be of one that is not.
    """

    token_ids: array[int]
    thinking: bool
    reasoning: str
    content: str
    calls: tuple[Call, ...] = ()
    call_ids: tuple[str, ...] = ()

    def has_calls_of(self, message: recipe.Message) -> bool:
        return tuple(call.id for call in message.tool_calls or ()) == self.call_ids

    def is_said_in(self, message: recipe.Message) -> bool:
        """True if a client's message is this turn, unchanged but for white space, JSON's form, lost reasoning."""
        if not self.has_calls_of(message) or message.content.strip() != self.content.strip():
            return False
        if len(self.calls) != len(self.call_ids):  # it ends in the middle of a call
            return False
        if message.reasoning_content and message.reasoning_content.strip() != self.reasoning.strip():
            return False
        sent = message.tool_calls or ()
        return all(map(_is_same_call, self.calls, sent))

    @property
    def num_bytes(self) -> int:
        texts = [self.reasoning, self.content, *self.call_ids]
        texts += [text for call in self.calls for name, value in call.arguments.items() for text in (name, value.text)]
        return _OVERHEAD + len(self.token_ids) * self.token_ids.itemsize + sum(map(sys.getsizeof, texts))


class SaidTurns:
    """Turns by owner and key, at most `max_bytes`: those that were not used for longest go first. From any thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._turns: OrderedDict[tuple[str, bytes], SaidTurn] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def keep(self, owner: str, key: bytes, turn: SaidTurn) -> None:
        if turn.num_bytes > self.max_bytes:
            return
        with self._lock:
            replaced = self._turns.pop((owner, key), None)
            self._bytes += turn.num_bytes - (0 if replaced is None else replaced.num_bytes)
            self._turns[owner, key] = turn
            while self._bytes > self.max_bytes:
                self._bytes -= self._turns.popitem(last=False)[1].num_bytes

    def find(self, owner: str, key: bytes) -> SaidTurn | None:
        with self._lock:
            turn = self._turns.get((owner, key))
            if turn is not None:
                self._turns.move_to_end((owner, key))
        return turn


def turn_key(before: bytes, content: str, call_ids: Sequence[str]) -> bytes:
    """Key of a turn. `before`: digest of the messages before it, of which one with calls is independent."""
    return _digest(b"call", call_ids[0]) if call_ids else _digest(b"text", before, content.strip())


def digests(messages: Sequence[recipe.Message]) -> Iterator[bytes]:
    """Digest of the messages before each message, and last that of all. Reasoning does not count: clients drop it."""
    found = b""
    for message in messages:
        yield found
        call_ids = (call.id for call in message.tool_calls or ())
        found = _digest(found, message.role, message.content.strip(), message.tool_call_id or "", *call_ids)
    yield found


def _digest(*parts: str | bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.digest()


def _is_same_call(said: Call, sent: recipe.ToolCall) -> bool:
    if said.name != sent.name:
        return False
    try:
        arguments = json.loads(sent.arguments)
        return _is_same(json.loads(said.arguments_json), arguments)
    except (ValueError, RecursionError, OverflowError):
        return False


def _is_same(said: object, sent: object) -> bool:
    """True if two JSON values are the same to a client that reads every number as a float."""
    if isinstance(said, dict) and isinstance(sent, dict):
        ours, theirs = cast("dict[str, object]", said), cast("dict[str, object]", sent)
        return ours.keys() == theirs.keys() and all(_is_same(value, theirs[name]) for name, value in ours.items())
    if isinstance(said, list) and isinstance(sent, list):
        items, others = cast("list[object]", said), cast("list[object]", sent)
        return len(items) == len(others) and all(map(_is_same, items, others))
    if isinstance(said, bool) or isinstance(sent, bool):
        return said is sent
    if isinstance(said, (int, float)) and isinstance(sent, (int, float)):
        return said == sent or float(said) == float(sent)
    return said == sent
