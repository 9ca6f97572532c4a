"""ChatService: the served models. Turns a request body into a Job, and a job into events of its wire format."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from dsv4.conversation.model import ConversationModel
from dsv4.conversation.turn import Turn
from dsv4.engine import ProgressEvent, Timings
from dsv4.engine.errors import EngineError, GrammarError, QueueFullError
from dsv4.engine.outputs import EventStream, complete
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.isolation import cache_salt
from dsv4.server.key_limits import KeyLimiter
from dsv4.server.merging import merged
from dsv4.server.metering import Client, Meter
from dsv4.server.model_names import check_name, conversion_options, without_context_suffix
from dsv4.server.progress import final_chunk, progress_chunk, with_report
from dsv4.server.recent_answers import RecentAnswer, RecentAnswers
from dsv4.server.request_log import log_prompt
from dsv4.server.requests import Bodies
from dsv4.server.served_models import ServedModel, ServedModels
from dsv4.server.threads import BodyThreads
from dsv4.server.wire_format import AnswerReader, Chunk, WireFormat, WireRequest
from dsv4.usage.ledger import Ledger


@dataclass(frozen=True)
class Part:
    """One answer of a job."""

    turn: Turn
    reader: AnswerReader
    events: EventStream  # of the engine, where the part has its place in the queue
    recent: RecentAnswer | None  # takes the tokens of the first part


@dataclass(frozen=True)
class Job:
    """A validated request, ready to run."""

    wire_format: WireFormat
    id: str
    request: WireRequest
    parts: tuple[Part, ...]  # at least one
    meter: Meter

    @property
    def turn(self) -> Turn:
        """Of the first answer."""
        return self.parts[0].turn

    @property
    def reader(self) -> AnswerReader:
        """Of the first answer."""
        return self.parts[0].reader

    @property
    def timings(self) -> Timings | None:
        """Of the latest event of the first answer, without tokens behind its end: a step may have several."""
        reader, timings = self.reader, self.reader.timings
        if timings is None or not reader.finished or timings.num_output_tokens == reader.num_tokens:
            return timings
        drafted = timings.num_output_tokens - reader.num_tokens - 1  # the last token of a step is no draft
        accepted = max(0, timings.num_accepted_tokens - drafted)
        return replace(timings, num_output_tokens=reader.num_tokens, num_accepted_tokens=accepted)


class ChatService:
    """Answers requests in every wire format with the served models."""

    def __init__(
        self,
        models: ServedModels,
        sharing: str = "all",
        ledger: Ledger | None = None,
        limiter: KeyLimiter | None = None,
        log_prompts: bool = False,
    ) -> None:
        """`sharing`: of stored prefixes, see server/isolation.py. `ledger`: keeps the usage of every job. `limiter`: of
        API keys. `log_prompts`: every prompt is logged.
        """
        self._log_prompts = log_prompts
        self._ledger, self.limiter = ledger, limiter
        self._sharing = sharing
        self.models = models
        self.recent = RecentAnswers()
        self.bodies, self.threads = Bodies(), BodyThreads()
        self.options = conversion_options(models.names)

    def check(self) -> None:
        """EngineError or QueueFullError if no request can be accepted, whatever it asks for."""
        refusals: list[Exception] = []
        for model in self.models:
            try:
                model.engine.check()
                model.engine.check_room()
                return
            except (EngineError, QueueFullError) as refusal:
                refusals.append(refusal)
        raise refusals[-1]

    def find(self, name: str | None, *, claude: bool = False) -> ServedModel:
        """The model of a name that a request gives, by default the first. RequestError 400 for an unknown name.

        `claude`: Anthropic's names are known too.
        """
        if name is None:
            return self.models.first
        name = without_context_suffix(name)
        check_name(name, self.options, claude=claude)
        return self.models.find(name)

    def prepare(self, wire_format: WireFormat, body: bytes, key: str | None = None) -> Job:
        """Validates, renders and tokenizes a request, and reserves its place in the queue. Slow for a long prompt: run
        it in a thread. `key`: the client's API key; keys, and users of a key, share the engine fairly. Raises
        RequestError and QueueFullError.
        """
        request = wire_format.read(body, self.options)
        served = self.models.find(request.model)
        served.engine.check()
        engine = served.engine
        request = replace(request, model=self.models.shown(request.model))
        salt = self._salt(request, key)
        conversation = served.conversation_of(key, salt)
        turns = [replace(turn, params=replace(turn.params, cache_salt=salt)) for turn in request.turns(conversation)]
        answer_id = wire_format.new_id()
        if self._log_prompts:
            for turn in turns:
                log_prompt(answer_id, conversation.prompts.tokenizer.decode(turn.prompt_token_ids))
        readers = request.readers(conversation, turns, answer_id)
        watched = request.stream and request.reports.progress
        start = engine.stream_with_progress if watched else engine.stream
        user = (key or "", request.user or "")
        try:
            events = [cast(EventStream, start(turn.prompt_token_ids, turn.params, user)) for turn in turns]
        except GrammarError as error:
            field = "tools" if error.field == "tools" else wire_format.format_field
            raise RequestError(400, f"Invalid schema for {field}: {error.reason}", param=field) from error
        client = Client(wire_format.name, request.model, key, request.user)
        meter = Meter(self._ledger, answer_id, client, request.prompt_counts(turns), self.limiter)
        first = self.recent.begin(answer_id, served.name, key or "", turns[0].prompt_token_ids)
        recent = [first, *[None] * (len(turns) - 1)]
        return Job(wire_format, answer_id, request, tuple(map(Part, turns, readers, events, recent)), meter)

    def count_tokens(self, wire_format: WireFormat, body: bytes, key: str | None = None) -> int:
        """Number of tokens of the rendered prompt. Raises RequestError as `prepare` does, but never for its length."""
        request = wire_format.read(body, self.options)
        return request.count_tokens(self.conversation(request, key))

    def conversation(self, request: WireRequest, key: str | None) -> ConversationModel:
        """Makes the prompt of a request of this key: with the turns that are remembered for it."""
        return self.models.find(request.model).conversation_of(key, self._salt(request, key))

    def _salt(self, request: WireRequest, key: str | None) -> str | None:
        return cache_salt(self._sharing, key, request.user, request.cache_salt)

    async def frames(self, job: Job) -> AsyncGenerator[Event, None]:
        """Runs a job; yields an event per chunk and per requested report.

        Closing the generator stops the generation, as does an answer that is complete before its tokens end.
        """
        model, reports = job.request.model, job.request.reports
        with job.meter:
            async with contextlib.aclosing(self._run(job)) as items:
                async for item in items:
                    if isinstance(item, ProgressEvent):
                        yield Event(progress_chunk(job.id, model, item))
                        continue
                    event = job.wire_format.event(item)
                    if reports.timings_per_token:
                        event = Event(with_report(event.data, job.timings, job.meter.official_cost), event.name)
                    yield event
        if reports.any and job.timings is not None:
            yield Event(final_chunk(job.id, model, job.timings, job.meter.official_cost))

    async def whole(self, job: Job) -> str:
        """Runs a job to its end; returns the format's response object as JSON."""
        answer = job.request.whole_answer(job.turn, job.id)
        with job.meter:
            async with contextlib.aclosing(self._run(job)) as items:
                async for item in items:
                    if not isinstance(item, ProgressEvent):
                        answer.accumulate(item)
        text = answer.to_json()
        return with_report(text, job.timings, job.meter.official_cost) if job.request.reports.any else text

    def _run(self, job: Job) -> AsyncGenerator[Chunk | ProgressEvent, None]:
        """Chunks of a job's answers as they come, after progress events if requested."""
        parts = [self._run_part(part, job.meter, place) for place, part in enumerate(job.parts)]
        return parts[0] if len(parts) == 1 else merged(parts)

    async def _run_part(self, part: Part, meter: Meter, place: int) -> AsyncGenerator[Chunk | ProgressEvent, None]:
        reader = part.reader
        async with contextlib.aclosing(part.events) as events:
            async for event in events:
                if isinstance(event, ProgressEvent):
                    yield event
                    continue
                aborted = event.finish_reason == "abort"
                try:
                    chunks: Sequence[Chunk] = reader.push(replace(event, finish_reason=None) if aborted else event)
                finally:
                    meter.count(event, reader, place)
                if aborted and not reader.finished:  # an answer that is not what was asked for must not look like it
                    raise RequestError(500, "the requested form of the answer is too complex to be followed further")
                if part.recent is not None:
                    part.recent.extend(event)
                    if reader.finished:
                        part.recent.shorten(reader.num_tokens)
                if reader.finished and event.finish_reason is None:
                    await complete(events)  # now: the client may be slow, or leave with the last chunk
                for chunk in chunks:
                    yield chunk
                if reader.finished:
                    return
