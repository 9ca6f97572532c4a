"""ChatService: one served model. Turns a request body into a Job, and a job into events of its wire format."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from dsv4.conversation.answer import thinks
from dsv4.conversation.model import ConversationModel
from dsv4.conversation.turn import Turn
from dsv4.engine import ProgressEvent, TokenEvent
from dsv4.engine.errors import GrammarError
from dsv4.engine.interface import Engine
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.isolation import cache_salt
from dsv4.server.key_limits import KeyLimiter
from dsv4.server.metering import Client, Meter
from dsv4.server.model_names import conversion_options
from dsv4.server.progress import progress_chunk, timings_chunk, with_timings
from dsv4.server.threads import BodyThreads
from dsv4.server.wire_format import AnswerReader, Chunk, WireFormat, WireRequest
from dsv4.tokenizer.special import END_THINK
from dsv4.usage.ledger import Ledger

EngineEvents = AsyncGenerator[TokenEvent | ProgressEvent, None]


@dataclass(frozen=True)
class Job:
    """A validated request, ready to run."""

    wire_format: WireFormat
    id: str
    request: WireRequest
    turn: Turn
    reader: AnswerReader
    events: EngineEvents  # of the engine, where the job has its place in the queue
    meter: Meter


class ChatService:
    """Answers requests in every wire format with one engine."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        aliases: Sequence[str],
        thinking: bool,
        sharing: str = "all",
        ledger: Ledger | None = None,
        limiter: KeyLimiter | None = None,
    ) -> None:
        """`thinking`: the default for requests that do not set it; True in the hosted service. `sharing`: of stored
        prefixes, see server/isolation.py. `ledger`: keeps the usage of every job. `limiter`: of API keys.
        """
        self._ledger, self._limiter = ledger, limiter
        self._sharing = sharing
        self.engine = engine
        self.conversation = ConversationModel(engine.llm)
        self.threads = BodyThreads()
        self.model_name = model_name
        self.model_names = list(dict.fromkeys([model_name, *aliases]))
        self._options = conversion_options(self.model_names, thinking)

    def prepare(self, wire_format: WireFormat, body: bytes, key: str | None = None) -> Job:
        """Validates, renders and tokenizes a request, and reserves its place in the queue. Slow for a long prompt: run
        it in a thread. `key`: the client's API key; keys, and users of a key, share the engine fairly. Raises
        RequestError and QueueFullError.
        """
        request = wire_format.read(body, self._options)
        salt = cache_salt(self._sharing, key, request.user, request.cache_salt)
        turn = request.turn(self.conversation)
        turn = replace(turn, params=replace(turn.params, cache_salt=salt))
        answer_id = wire_format.new_id()
        reader = request.reader(self.conversation, turn, answer_id)
        watched = request.stream and request.reports.progress
        start = self.engine.stream_with_progress if watched else self.engine.stream
        user = (key or "", request.user or "")
        try:
            events = cast(EngineEvents, start(turn.prompt_token_ids, turn.params, user))
        except GrammarError as error:
            field = "tools" if error.field == "tools" else wire_format.format_field
            raise RequestError(400, f"Invalid schema for {field}: {error.reason}", param=field) from error
        client = Client(wire_format.name, request.model, key, request.user)
        return Job(wire_format, answer_id, request, turn, reader, events, self._meter(answer_id, client, turn))

    def _meter(self, answer_id: str, client: Client, turn: Turn) -> Meter:
        tokenizer = self.conversation.prompts.tokenizer
        end = tokenizer.special_id(END_THINK) if thinks(turn.parsing) else None
        return Meter(self._ledger, answer_id, client, len(turn.prompt_token_ids), end, self._limiter)

    def count_tokens(self, wire_format: WireFormat, body: bytes) -> int:
        """Number of tokens of the rendered prompt. Raises RequestError as `prepare` does, but never for its length."""
        return wire_format.read(body, self._options).count_tokens(self.conversation)

    async def frames(self, job: Job) -> AsyncGenerator[Event, None]:
        """Runs a job; yields an event per chunk and per requested report.

        Closing the generator stops the generation, as does an answer that is complete before its tokens end.
        """
        model, reports, reader = job.request.model, job.request.reports, job.reader
        async with contextlib.aclosing(self._run(job)) as items:
            async for item in items:
                if isinstance(item, ProgressEvent):
                    yield Event(progress_chunk(job.id, model, item))
                    continue
                event = job.wire_format.event(item)
                if reports.timings_per_token:
                    event = Event(with_timings(event.data, reader.timings), event.name)
                yield event
        if reports.any and reader.timings is not None:
            yield Event(timings_chunk(job.id, model, reader.timings))

    async def whole(self, job: Job) -> str:
        """Runs a job to its end; returns the format's response object as JSON."""
        answer = job.request.whole_answer(job.turn, job.id)
        async with contextlib.aclosing(self._run(job)) as items:
            async for item in items:
                if not isinstance(item, ProgressEvent):
                    answer.accumulate(item)
        text = answer.to_json()
        return with_timings(text, job.reader.timings) if job.request.reports.any else text

    async def _run(self, job: Job) -> AsyncGenerator[Chunk | ProgressEvent, None]:
        """Runs a job; yields the answer's chunks, after progress events if requested."""
        with job.meter:
            async with contextlib.aclosing(job.events) as events:
                async for event in events:
                    if isinstance(event, ProgressEvent):
                        yield event
                        continue
                    job.meter.count(event)
                    if event.finish_reason == "abort":  # an answer that is not what was asked for must not look like it
                        raise RequestError(
                            500, "the requested form of the answer is too complex to be followed further"
                        )
                    for chunk in job.reader.push(event):
                        yield chunk
                    if job.reader.finished:
                        return
