"""Prompts in which the model's earlier turns are the tokens that it sampled.

deepseek-recipe renders text. A turn that is to be replayed is rendered with a mark in it that occurs nowhere else; its
tokens take the place of the text from the mark to the end of the turn.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import deepseek_recipe as recipe

from dsv4.conversation.said_turns import SaidTurn, digests, turn_key
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.long_integers import Rendered
from dsv4.tokenizer.prompts import PromptEncoder, with_messages
from dsv4.tokenizer.special import END_THINK, EOS, THINK

Find = Callable[[bytes], SaidTurn | None]  # a turn by its key


@dataclass(frozen=True)
class Prompt:
    """A prompt as rendered text, and between its pieces the tokens of replayed turns.

    history: digest of the conversation's messages (said_turns.py).
    """

    pieces: tuple[Rendered | Sequence[int], ...]
    history: bytes

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        ids: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, Rendered):
                ids += tokenizer.encode_rendered(piece.prompt, piece.special_ranges)
            else:
                ids += piece
        return ids

    def count(self, tokenizer: Tokenizer) -> int:
        """Number of tokens of `encode`, without building the list."""
        return self._sum(tokenizer.count_rendered)

    def min_tokens(self, tokenizer: Tokenizer) -> int:
        """Lower bound on `count`, without tokenizing."""
        return self._sum(tokenizer.min_tokens_rendered)

    def _sum(self, count: Callable[[str, Sequence[tuple[int, int]]], int]) -> int:
        return sum(
            count(piece.prompt, piece.special_ranges) if isinstance(piece, Rendered) else len(piece)
            for piece in self.pieces
        )


def replayed(prompts: PromptEncoder, conversation: recipe.Conversation, find: Find) -> Prompt:
    """The prompt of a conversation. Reasoning that the client has lost is filled in where a turn is not replayed."""
    thinking, messages = conversation.thinking_mode, conversation.messages
    *before, history = digests(messages)
    filled = list(messages)
    turns: dict[int, SaidTurn] = {}  # by place of the message
    for place, turn in _known(messages, before, find):
        message = messages[place]
        if turn.thinking != thinking or not turn.has_calls_of(message):
            continue
        if thinking and not message.reasoning_content:
            filled[place] = recipe.AssistantMessage(message.content, turn.reasoning, message.tool_calls)
        if turn.is_said_in(message):
            turns[place] = turn
    if turns:
        mark = secrets.token_hex(16)
        marked = list(filled)
        for place in turns:
            marked[place] = _marked(filled[place], f"{mark}{place}.", thinking)
        rendered = prompts.render(with_messages(conversation, marked))
        pieces = _cut(rendered, turns, mark, THINK if thinking else END_THINK)
        if pieces is not None:
            return Prompt(tuple(pieces), history)
    return Prompt((prompts.render(with_messages(conversation, filled)),), history)


def _known(messages: Sequence[recipe.Message], before: Sequence[bytes], find: Find) -> Iterator[tuple[int, SaidTurn]]:
    """Places and turns of the messages that are found. `before`: digest of the messages before each."""
    for place, (message, digest) in enumerate(zip(messages, before, strict=True)):
        if isinstance(message, recipe.AssistantMessage) and not message.prefix:
            turn = find(turn_key(digest, message.content, [call.id for call in message.tool_calls or ()]))
            if turn is not None:
                yield place, turn


def _marked(message: recipe.Message, mark: str, thinking: bool) -> recipe.Message:
    """The message with a mark at the beginning of its turn."""
    content, reasoning = (message.content, mark) if thinking else (mark + message.content, None)
    return recipe.AssistantMessage(content, reasoning, message.tool_calls)


def _cut(
    rendered: Rendered, turns: Mapping[int, SaidTurn], mark: str, begin: str
) -> list[Rendered | Sequence[int]] | None:
    """Pieces with the turns' tokens; None if a mark is not at the beginning of its turn.

    A mark that is missing was in reasoning that the model does not see again.
    """
    text, ranges = rendered.prompt, rendered.special_ranges
    ends = [start for start, stop in ranges if text[start:stop] == EOS]
    pieces: list[Rendered | Sequence[int]] = []
    place = 0
    for found in re.finditer(rf"{mark}(\d+)\.", text):
        end = bisect_left(ends, found.end())
        if end == len(ends) or not text.endswith(begin, 0, found.start()):
            return None
        pieces += [_part(rendered, place, found.start()), turns[int(found[1])].token_ids]
        place = ends[end]
    return [*pieces, _part(rendered, place, len(text))]


def _part(rendered: Rendered, start: int, stop: int) -> Rendered:
    ranges = rendered.special_ranges
    first, end = (bisect_left(ranges, (place, place)) for place in (start, stop))
    return Rendered(rendered.prompt[start:stop], [(a - start, b - start) for a, b in ranges[first:end]])
