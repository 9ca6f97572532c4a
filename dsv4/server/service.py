"""ChatService: one served model. A request body becomes a Job, and a job becomes the protocol's chunks."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import cast

import deepseek_recipe as recipe

from dsv4.conversation.answer import Answer, Chunk, Generator
from dsv4.conversation.model import ConversationModel
from dsv4.conversation.turn import Turn
from dsv4.engine import AsyncEngine, ProgressEvent, TokenEvent
from dsv4.server.errors import RequestError
from dsv4.server.leniency import Adapted, adapt_chat, adapt_messages
from dsv4.server.progress import Reports, progress_chunk, requested_reports, timings_chunk, with_timings
from dsv4.server.refusals import describe, is_bad_json
from dsv4.server.threads import BodyThreads
from dsv4.server.tool_inputs import ToolInputs
from dsv4.server.wishes import Sampling

EngineEvents = AsyncGenerator[TokenEvent | ProgressEvent, None]
Request = recipe.ChatCompletionRequest | recipe.MessagesRequest
Response = recipe.ChatCompletionResponse | recipe.MessagesResponse

# The names under which the hosted service offers V4: clients that are set up for it work unchanged.
OFFICIAL_NAMES = ("deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash")


@dataclass(frozen=True)
class Protocol:
    """One API: deepseek-recipe's request and response types, and the leniencies that this server adds."""

    name: str
    adapt: Callable[[bytes], Adapted]
    request: type[Request]
    response: type[Response]
    accepts_claude_names: bool  # clients made for Anthropic's models insist on their names
    auto: str  # the tool choice that leaves the model free

    def generator(self, request: recipe.ConversationRequest, answer_id: str, model: str) -> Generator:
        return self.request.chunk_generator(request, answer_id, model)


CHAT = Protocol(
    "chat.completions", adapt_chat, recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, False, '"auto"'
)
MESSAGES = Protocol(
    "messages", adapt_messages, recipe.MessagesRequest, recipe.MessagesResponse, True, '{"type": "auto"}'
)


@dataclass(frozen=True)
class Job:
    """A checked request, ready to run."""

    protocol: Protocol
    id: str
    model: str  # the name that the client used
    stream: bool
    turn: Turn
    generator: Generator
    reports: Reports
    events: EngineEvents  # of the engine: the job has its place in the queue


class ChatService:
    """Answers conversations with one engine, for every protocol."""

    def __init__(self, engine: AsyncEngine, model_name: str, aliases: Sequence[str], thinking: bool) -> None:
        """`thinking`: whether a request that does not say thinks, as the hosted service does."""
        self.engine = engine
        self.conversation = ConversationModel(engine.llm)
        self.threads = BodyThreads()
        self.model_name = model_name
        self.model_names = list(dict.fromkeys([model_name, *aliases]))
        self._options = recipe.ConversionOptions(
            default_thinking_mode=thinking,
            messages_web_search=recipe.WebSearchBehavior.Drop,
        ).with_model_versions_by_name(dict.fromkeys(self.model_names, recipe.ModelVersion.DeepseekV4Pro))

    def prepare(self, protocol: Protocol, body: bytes) -> Job:
        """Checks, renders and tokenises a request, and takes its place in the queue. Slow for a long prompt: run it in
        a thread. Raises RequestError and QueueFullError.
        """
        model, converted, sampling = self._convert(protocol, body)
        reports = requested_reports(body) if protocol is CHAT else Reports()
        try:
            turn = self.conversation.prepare(converted, top_k=sampling.top_k, min_p=sampling.min_p)
        except recipe.ConversionError as error:
            raise RequestError.from_recipe(error) from error
        answer_id = str(uuid.uuid4())
        generator = protocol.generator(converted, answer_id, model)
        watched = converted.stream and reports.progress
        start = self.engine.stream_with_progress if watched else self.engine.stream
        events = cast(EngineEvents, start(turn.prompt_token_ids, turn.params))
        return Job(protocol, answer_id, model, converted.stream, turn, generator, reports, events)

    def count_tokens(self, protocol: Protocol, body: bytes) -> int:
        """Tokens of the rendered prompt. Raises RequestError as `prepare` does, but never for its length."""
        _, converted, _ = self._convert(protocol, body)
        return self.conversation.prompts.count(converted.conversation)

    async def frames(self, job: Job) -> AsyncGenerator[tuple[str | None, str], None]:
        """Runs a job: event name and JSON of each chunk, and of the reports that the request asks for.

        Closing the generator stops the generation; so does an answer that ends before its tokens do.
        """
        response, reports = job.protocol.response, job.reports
        answer = self.conversation.answer(job.turn, job.generator)
        async with contextlib.aclosing(self._run(job, answer)) as items:
            async for item in items:
                if isinstance(item, ProgressEvent):
                    yield None, progress_chunk(job.id, job.model, item)
                    continue
                name = response.sse_event_name(item)  # pyright: ignore[reportArgumentType]  # of the same protocol
                text = item.to_json()
                yield name, with_timings(text, answer.timings) if reports.timings_per_token else text
        if reports.any and answer.timings is not None:
            yield None, timings_chunk(job.id, job.model, answer.timings)

    async def whole(self, job: Job) -> str:
        """Runs a job to its end; the protocol's response object as JSON."""
        response = job.protocol.response(job.id, job.model, int(time.time()), len(job.turn.prompt_token_ids), 0)
        answer, inputs = self.conversation.answer(job.turn, job.generator), ToolInputs()
        async with contextlib.aclosing(self._run(job, answer)) as items:
            async for item in items:
                if not isinstance(item, ProgressEvent):
                    if job.protocol is MESSAGES:
                        inputs.add(item.to_json())
                    response.accumulate(item)  # pyright: ignore[reportArgumentType]  # generator and response are a pair
        text = inputs.restore(response.to_json())
        return with_timings(text, answer.timings) if job.reports.any else text

    async def _run(self, job: Job, answer: Answer) -> AsyncGenerator[Chunk | ProgressEvent, None]:
        """Runs a job: the answer's chunks, after the progress of a stream that asks for it."""
        async with contextlib.aclosing(job.events) as events:
            async for event in events:
                if isinstance(event, ProgressEvent):
                    yield event
                    continue
                for chunk in answer.push(event):
                    yield chunk
                if answer.finished:
                    return

    def _convert(self, protocol: Protocol, body: bytes) -> tuple[str, recipe.ConversationRequest, Sampling]:
        """The model's name, the conversation and the sampling of a body. Raises RequestError with the fault's place."""
        adapted = protocol.adapt(body)
        try:
            request = protocol.request(adapted.body)
            model = request.model
            converted = request.convert(self._options_for(protocol, model))
        except (recipe.ConversionError, ValueError) as error:
            raise self._refusal(protocol, body, error) from error
        return model, converted, adapted.sampling

    def _options_for(self, protocol: Protocol, model: str) -> recipe.ConversionOptions:
        if protocol.accepts_claude_names and model.startswith("claude-"):
            return self._options.with_model_alias(model, recipe.ModelVersion.DeepseekV4Pro)
        return self._options

    def _refusal(self, protocol: Protocol, body: bytes, error: recipe.ConversionError | ValueError) -> RequestError:
        def parse(part: bytes) -> Request:
            return protocol.request(protocol.adapt(part).body)

        def convert(part: bytes) -> recipe.ConversationRequest:
            request = parse(part)
            return request.convert(self._options_for(protocol, request.model))

        try:
            protocol.request(body)
        except ValueError as first:
            if is_bad_json(first):
                error = first  # its line and column are those of the body that came, not of the adapted one
        return describe(error, body, parse, convert, protocol.auto)
