"""Usage of Chat Completions: reasoning is counted as it was sampled. deepseek-recipe tokenizes its text once more."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import deepseek_recipe as recipe

from dsv4.engine import TokenEvent
from dsv4.server.wire_format import Chunk, OuterReader

_REASONING = re.compile(r'"reasoning_tokens":\d+')  # in a string of JSON its quotes are escaped


@dataclass(frozen=True)
class CountedChunk:
    """The last chunk of an answer, which has the usage."""

    chunk: recipe.ChatCompletionChunk
    reasoning_tokens: int

    def to_json(self) -> str:
        return _counted(self.chunk.to_json(), self.reasoning_tokens)


class ChatReader(OuterReader):
    """Reads an answer's chunks from those of deepseek-recipe."""

    def push(self, event: TokenEvent) -> Sequence[Chunk]:
        chunks = self._inner.push(event)
        if not self.finished or not chunks:
            return chunks
        last = cast(recipe.ChatCompletionChunk, chunks[-1])
        return [*chunks[:-1], CountedChunk(last, self.num_reasoning_tokens)]


class WholeChat:
    """Accumulates the chunks of an answer."""

    def __init__(self, answer: recipe.ChatCompletionResponse) -> None:
        self._answer, self._reasoning_tokens = answer, 0

    def accumulate(self, chunk: CountedChunk | recipe.ChatCompletionChunk) -> None:
        if isinstance(chunk, CountedChunk):
            self._reasoning_tokens, chunk = chunk.reasoning_tokens, chunk.chunk
        self._answer.accumulate(chunk)

    def to_json(self) -> str:
        return _counted(self._answer.to_json(), self._reasoning_tokens)


def _counted(text: str, reasoning_tokens: int) -> str:
    return _REASONING.sub(f'"reasoning_tokens":{reasoning_tokens}', text)
