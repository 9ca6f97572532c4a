"""Completions in the shape of text_completion objects: chunks of a stream, and a whole answer from these."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4.conversation.vocabulary import Vocabulary
from dsv4.engine import Timings, TokenEvent
from dsv4.engine.outputs import Alternatives, EndReason
from dsv4.server.unchecked_json import Json


@dataclass
class Tally:
    """Usage of a request, summed over its completions; a prompt counts once, however many continue it."""

    num_unfinished: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


@dataclass(frozen=True)
class CompletionChunk:
    """A part of a completion. `usage`: of the whole request, in its last chunk."""

    head: Json
    index: int
    text: str
    logprobs: Json | None
    finish_reason: str | None
    usage: Json | None
    usage_is_null: bool  # the key stands in the chunks before the last too
    score: float = 0.0  # mean log-probability of the completion's tokens, in its last chunk

    def to_json(self) -> str:
        choice = {
            "text": self.text,
            "index": self.index,
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
        }
        usage = {} if self.usage is None and not self.usage_is_null else {"usage": self.usage}
        return json.dumps(self.head | {"choices": [choice], **usage}, separators=(",", ":"))


def answer_head(answer_id: str, model: str) -> Json:
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


@dataclass(frozen=True)
class Echo:
    """The prompt as it is returned: its text, and its tokens without the begin-of-sentence token that was added."""

    text: str
    token_ids: Sequence[int]
    only: bool = False  # True: no completion follows


@dataclass
class CompletionReader:
    """Turns the token events of one completion into chunks.

    Log-probabilities are sent with the text of their tokens, so that tokens of a stop string are not sent.
    """

    head: Json
    index: int
    vocabulary: Vocabulary
    tally: Tally
    num_prompt_tokens: int  # 0 for further completions of a prompt
    wants_logprobs: bool
    include_usage: bool
    echo: Echo | None = None
    timings: Timings | None = None
    finished: bool = False  # never before the tokens end
    end_reason: EndReason | None = None  # theirs
    num_tokens: int = 0
    num_reasoning_tokens: int = 0  # a completion does not think
    _started: bool = False
    _place: int = 0  # in characters: where the text of the next token begins
    _shown: int = 0  # characters that were sent
    _sum: float = 0.0
    _count: int = 0
    _held: deque[tuple[int, Json]] = field(default_factory=deque[tuple[int, Json]])

    def __post_init__(self) -> None:
        self._decoder = self.vocabulary.tokenizer.decode_stream()

    def push(self, event: TokenEvent) -> list[CompletionChunk]:
        self.timings = event.timings
        text, entries = "", list[Json]()
        if not self._started:
            self._started = True
            text, entries = self._begin(event)
        if self.echo is None or not self.echo.only:
            text += event.text
            entries += self._entries(event)
            self.num_tokens += len(event.token_ids)
            self.tally.completion_tokens += len(event.token_ids)
        if event.finish_reason is None and not text and not entries:
            return []
        done = event.finish_reason is not None
        self.tally.num_unfinished -= done
        last = done and self.tally.num_unfinished == 0
        logprobs = _columns(entries) if self.wants_logprobs else None
        usage = self.tally.usage() if last else None
        reason = "length" if done and self.echo is not None and self.echo.only else event.finish_reason
        score = self._sum / max(1, self._count)
        chunk = CompletionChunk(self.head, self.index, text, logprobs, reason, usage, self.include_usage, score)
        return [chunk]

    def _begin(self, event: TokenEvent) -> tuple[str, list[Json]]:
        """Counts the prompt; returns what is echoed of it."""
        self.tally.prompt_tokens += self.num_prompt_tokens
        if self.num_prompt_tokens:
            self.tally.cached_tokens += event.cached_tokens
        if self.echo is None:
            return "", []
        entries: list[Json] = []
        decoder = self.vocabulary.tokenizer.decode_stream()
        place = 0
        skipped = len(event.prompt_logprobs) - len(self.echo.token_ids)
        for i, token_id in enumerate(self.echo.token_ids if self.wants_logprobs else ()):
            logprob = event.prompt_logprobs[skipped + i]
            alternatives = event.prompt_top_logprobs[skipped + i]
            entries.append(self._entry(token_id, logprob, alternatives, place))
            place += len(decoder.push(token_id)) if token_id < self.vocabulary.size else 0
        self._place = self._shown = len(self.echo.text)
        return self.echo.text, entries

    def _entries(self, event: TokenEvent) -> list[Json]:
        """Log-probabilities of the tokens whose text is sent with this event."""
        self._shown += len(event.text)
        if not event.logprobs:
            return []
        scored = zip(event.token_ids, event.logprobs, event.top_logprobs, strict=True)
        for number, (token_id, logprob, alternatives) in enumerate(scored, 1):
            self._sum, self._count = self._sum + logprob, self._count + 1
            last = number == len(event.token_ids) and event.finish_reason == "stop"
            if last and token_id in self.vocabulary.stop_token_ids:
                continue  # the end of the sentence has no text
            self._held.append((self._place, self._entry(token_id, logprob, alternatives, self._place)))
            if not self.vocabulary.is_hidden(token_id):
                self._place += len(self._decoder.push(token_id))
        everything = event.finish_reason == "length"
        entries: list[Json] = []
        while self._held and (everything or self._held[0][0] < self._shown):
            entries.append(self._held.popleft()[1])
        return entries

    def _entry(self, token_id: int, logprob: float | None, alternatives: Alternatives, place: int) -> Json:
        """One token. Its alternatives include itself, also where it is not among the likeliest."""
        spelling = self._spelling(token_id)
        likeliest: dict[str, float] | None = None
        if logprob is not None:
            likeliest = {}
            for other, value in (*alternatives, (token_id, logprob)):
                likeliest.setdefault(self._spelling(other), value)
        return {"token": spelling, "logprob": logprob, "top": likeliest, "offset": place}

    def _spelling(self, token_id: int) -> str:
        """Text of a token, `bytes:\\xe2\\x80` for a part of a character, as OpenAI spells it."""
        if token_id >= self.vocabulary.size:
            return f"token_id:{token_id}"
        data = self.vocabulary.tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _columns(entries: list[Json]) -> Json:
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [entry["top"] for entry in entries],
        "text_offset": [entry["offset"] for entry in entries],
    }


class WholeCompletion:
    """Accumulates the chunks of all candidates; of each prompt the likeliest are returned."""

    def __init__(self, head: Json, num_candidates: int, num_outputs: int) -> None:
        self._head, self._num_candidates, self._num_outputs = head, num_candidates, num_outputs
        self._choices: dict[int, Json] = {}
        self._scores: dict[int, float] = {}
        self._usage: Json | None = None

    def accumulate(self, chunk: CompletionChunk) -> None:
        empty: Json = {"text": "", "index": chunk.index, "logprobs": None, "finish_reason": None}
        choice = self._choices.setdefault(chunk.index, empty)
        choice["text"] += chunk.text
        choice["finish_reason"] = chunk.finish_reason
        if chunk.logprobs is not None:
            known: Json = choice["logprobs"] or {}
            choice["logprobs"] = {name: [*known.get(name, ()), *values] for name, values in chunk.logprobs.items()}
        self._scores[chunk.index] = chunk.score
        self._usage = chunk.usage or self._usage

    def to_json(self) -> str:
        choices: list[Any] = []
        for first in range(0, len(self._choices), self._num_candidates):
            candidates = range(first, first + self._num_candidates)
            # Stable: among equals, and where nothing is left out, the order is that of the candidates.
            best = sorted(candidates, key=lambda i: -self._scores[i]) if self._ranks else candidates
            choices += [self._choices[i] for i in best[: self._num_outputs]]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return json.dumps(self._head | {"choices": choices, "usage": self._usage}, separators=(",", ":"))

    @property
    def _ranks(self) -> bool:
        return self._num_candidates > self._num_outputs
