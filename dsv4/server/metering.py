"""Meter: counts the tokens of one job and hands its usage to the ledger when the job ends, however it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

from dsv4.engine import TokenEvent
from dsv4.server.key_limits import KeyLimiter
from dsv4.server.wire_format import AnswerReader
from dsv4.usage.ledger import Ledger
from dsv4.usage.prices import OfficialCost, Tokens, official_cost, price_list
from dsv4.usage.records import UsageRecord, masked, plain, time_text


@dataclass(frozen=True)
class Client:
    """User and model of a request, by its own words."""

    wire_format: str
    model: str
    key: str | None
    user: str | None


class Meter:
    """Context of a job's run: `count` its events; on exit its record goes to the ledger, if there is one."""

    def __init__(
        self,
        ledger: Ledger | None,
        request_id: str,
        client: Client,
        num_prompt_tokens: Sequence[int],
        limiter: KeyLimiter | None = None,
    ) -> None:
        """`num_prompt_tokens`: of each answer of the job, 0 for a further one to a prompt. `limiter`: of the client's
        key.
        """
        self._limiter = limiter
        self._take(sum(num_prompt_tokens), client.key)
        self._ledger = ledger
        self._request_id = request_id
        self._client = client
        self._num_prompt_tokens = list(num_prompt_tokens)  # of answers that have not begun
        self._arrived = datetime.now(UTC)
        self._started = time.monotonic()
        self._hit = self._miss = 0
        self._outputs, self._reasonings = [0] * len(num_prompt_tokens), [0] * len(num_prompt_tokens)  # of each answer
        self._finish_reasons: list[str | None] = [None] * len(num_prompt_tokens)

    def _take(self, tokens: int, key: str | None) -> None:
        if self._limiter is not None and key is not None:
            self._limiter.take(key, tokens)

    def count(self, event: TokenEvent, reader: AnswerReader, place: int = 0) -> None:
        """Takes what `reader` counts of answer `place` after an event."""
        self._finish_reasons[place] = reader.end_reason or event.finish_reason
        prompt = self._num_prompt_tokens[place]
        if prompt:
            self._hit += event.cached_tokens
            self._miss += prompt - event.cached_tokens
            self._num_prompt_tokens[place] = 0
        self._take(reader.num_tokens - self._outputs[place], self._client.key)
        self._outputs[place], self._reasonings[place] = reader.num_tokens, reader.num_reasoning_tokens

    @property
    def tokens(self) -> Tokens:
        """Of the events so far."""
        return Tokens(self._hit, self._miss, sum(self._outputs), sum(self._reasonings))

    @property
    def official_cost(self) -> OfficialCost | None:
        """Of the tokens so far, at the prices of the job's beginning; None without a price then."""
        return official_cost(self._client.model, self._arrived, self.tokens)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ledger is not None:
            self._ledger.add(self._record(self._finish_reason(kind)))

    def _finish_reason(self, kind: type[BaseException] | None) -> str:
        """Of all answers together, after an exception of this kind."""
        reasons = self._finish_reasons
        if kind is not None and not issubclass(kind, (GeneratorExit, asyncio.CancelledError)):
            return "error"
        if kind is not None and None in reasons:
            return "cancelled"
        return "length" if "length" in reasons else "stop"

    def _record(self, finish_reason: str) -> UsageRecord:
        tokens, client = self.tokens, self._client
        return UsageRecord(
            time=time_text(self._arrived),
            request_id=self._request_id,
            wire_format=client.wire_format,
            model=plain(client.model),
            api_key=masked(client.key),
            user_id=plain(client.user),
            prompt_tokens=tokens.hit + tokens.miss,
            cache_hit_tokens=tokens.hit,
            cache_miss_tokens=tokens.miss,
            completion_tokens=tokens.output,
            reasoning_tokens=tokens.reasoning,
            finish_reason=finish_reason,
            seconds=round(time.monotonic() - self._started, 3),
            cost_usd=price_list().cost(client.model, self._arrived, tokens),
        )
