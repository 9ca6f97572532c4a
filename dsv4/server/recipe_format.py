"""RecipeFormat: wire formats that deepseek-recipe parses, validates and serializes."""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import deepseek_recipe as recipe

from dsv4.conversation.answer import Answer, Generator
from dsv4.conversation.model import ConversationModel
from dsv4.conversation.replay import Prompt
from dsv4.conversation.structure import Structure
from dsv4.conversation.turn import Turn
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.isolation import requested_salt
from dsv4.server.leniency import Adapted, adapt_body
from dsv4.server.model_names import options_for
from dsv4.server.progress import Reports
from dsv4.server.refusals import describe, is_bad_json
from dsv4.server.unchecked_json import Json
from dsv4.server.wire_format import AnswerReader, Chunk, WholeAnswer, WireFormat, WireRequest
from dsv4.server.wishes import Sampling, unavailable

_NO_FORCED_TOOL = "Thinking mode does not support this tool_choice"

Request = recipe.ChatCompletionRequest | recipe.MessagesRequest | recipe.ResponsesRequest
Response = recipe.ChatCompletionResponse | recipe.MessagesResponse | recipe.ResponsesResponse


class RecipeFormat(WireFormat):
    """A format with deepseek-recipe's request and response types, plus this server's leniency."""

    request: ClassVar[type[Request]]
    response: ClassVar[type[Response]]
    free_tool_choice: ClassVar[object]  # "auto" in this format

    @abstractmethod
    def adapt(self, request: Json) -> None:
        """Adapts a request in place to what deepseek-recipe accepts. RequestError for unsupported parameters."""

    @abstractmethod
    def structure(self, request: Json) -> Structure:
        """The form that a request wants of its answer. RequestError for a form that this server does not have."""

    @abstractmethod
    def user(self, request: Json) -> object:
        """Id of the client's user in a request, None without one."""

    def reports(self, body: bytes) -> Reports:
        """Extra reports that a valid request asks for."""
        return Reports()

    def options_for(self, model: str, options: recipe.ConversionOptions) -> recipe.ConversionOptions:
        """Conversion options for a request that names this model. RequestError for a retired name."""
        return options_for(model, options)

    def without_thinking(self, request: Json) -> Json:
        """The request with thinking switched off."""
        plain = {name: value for name, value in request.items() if name != "reasoning_effort"}
        return plain | {"thinking": {"type": "disabled"}}

    def settings(self, request: Request, options: recipe.ConversionOptions) -> object:
        """Parts of deepseek-recipe's request that the format's generator needs; the conversion consumes it."""
        return None

    def generator(self, request: RecipeRequest, answer_id: str) -> Generator:
        return self.request.chunk_generator(request.converted, answer_id, request.model)

    def reader(self, request: RecipeRequest, answer: Answer, answer_id: str) -> AnswerReader:
        """Reader of an answer's tokens over the `answer` that deepseek-recipe's generator makes."""
        return answer

    def whole_answer(self, answer_id: str, model: str, num_prompt_tokens: int) -> WholeAnswer:
        return self.response(answer_id, model, int(time.time()), num_prompt_tokens, 0)

    def read(self, body: bytes, options: recipe.ConversionOptions) -> RecipeRequest:
        adapted = self.adapted(body)
        try:
            request = self.request(adapted.body)
            model, structure = request.model, self.structure(adapted.request)
            options = self.options_for(model, options)
            settings = self.settings(request, options)
            converted = self.converted(adapted.body, options, structure)
        except (recipe.ConversionError, ValueError) as error:
            raise self._refusal(body, options, error) from error
        _refuse_form(converted.conversation, self.format_field)
        _refuse_choice(structure, converted.conversation)
        return RecipeRequest(
            model,
            converted.stream,
            self.reports(body),
            self,
            converted,
            adapted.sampling,
            structure,
            adapted.request,
            settings,
        )

    def converted(
        self, body: bytes, options: recipe.ConversionOptions, structure: Structure
    ) -> recipe.ConversationRequest:
        """Converts an adapted body. ConversionError and ValueError as of deepseek-recipe."""
        return self._forced(body, options) if structure.forces_call else self.request(body).convert(options)

    def shortened(self, request: RecipeRequest, model: ConversationModel) -> Turn | None:
        """Turn of a conversation that is too long, if the request wants it shortened."""
        return None

    def _forced(self, body: bytes, options: recipe.ConversionOptions) -> recipe.ConversationRequest:
        """Converts a request that forces a call. ConversionError and ValueError as of deepseek-recipe.

        deepseek-recipe refuses one that thinks: that is converted with a free choice, after a check without thinking.
        """
        try:
            return self.request(body).convert(options)
        except recipe.ConversionError as error:
            if str(error) != _NO_FORCED_TOOL:
                raise
        request = cast(Json, json.loads(body))
        self.request(json.dumps(self.without_thinking(request))).convert(options)
        return self.request(json.dumps(request | {"tool_choice": self.free_tool_choice})).convert(options)

    def adapted(self, body: bytes) -> Adapted:
        """The body in the form for deepseek-recipe."""
        return adapt_body(body, self.adapt)

    def event(self, chunk: Chunk) -> Event:
        return Event(chunk.to_json(), self.response.sse_event_name(cast(Any, chunk)))

    def last_words(self) -> bytes:
        done = self.response.sse_done_data()
        return b"" if done is None else Event(done).encode()

    def _refusal(
        self, body: bytes, options: recipe.ConversionOptions, error: recipe.ConversionError | ValueError
    ) -> RequestError:
        def parse(part: bytes) -> Request:
            return self.request(self.adapted(part).body)

        def convert(part: bytes) -> recipe.ConversationRequest:
            request = parse(part)
            return request.convert(self.options_for(request.model, options))

        try:
            self.request(body)
        except ValueError as first:
            if is_bad_json(first):
                error = first  # its line and column refer to the received body, not to the adapted one
        return describe(error, body, parse, convert)


@dataclass(frozen=True)
class RecipeRequest(WireRequest):
    """A request that deepseek-recipe has converted to a conversation."""

    wire_format: RecipeFormat
    converted: recipe.ConversationRequest
    sampling: Sampling
    structure: Structure
    received: Json
    settings: object = None

    @property
    def user(self) -> str | None:
        user = self.wire_format.user(self.received)
        return None if user is None else str(user)

    @property
    def cache_salt(self) -> str | None:
        return requested_salt(self.received)

    def turn(self, model: ConversationModel) -> Turn:
        try:
            return self.prepared(model, self.converted)
        except recipe.ConversionError as error:
            shortened = self.wire_format.shortened(self, model)
            if shortened is None:
                raise RequestError.from_recipe(error) from error
            return shortened

    def prepared(self, model: ConversationModel, converted: recipe.ConversationRequest) -> Turn:
        return model.prepare(converted, **asdict(self.sampling), structure=self.structure)

    def count_tokens(self, model: ConversationModel) -> int:
        return self._prompt(model).count(model.prompts.tokenizer)

    def prompt_token_ids(self, model: ConversationModel) -> list[int]:
        """The rendered prompt, without a limit."""
        return self._prompt(model).encode(model.prompts.tokenizer)

    def _prompt(self, model: ConversationModel) -> Prompt:
        return model.prompt(self.structure.conversation(self.converted.conversation))

    def reader(self, model: ConversationModel, turn: Turn, answer_id: str) -> AnswerReader:
        answer = model.answer(turn, self.wire_format.generator(self, answer_id))
        return self.wire_format.reader(self, answer, answer_id)

    def whole_answer(self, turn: Turn, answer_id: str) -> WholeAnswer:
        return self.wire_format.whole_answer(answer_id, self.model, len(turn.prompt_token_ids))


def _refuse_form(conversation: recipe.Conversation, field: str) -> None:
    """RequestError for forms that no constraint can have."""
    if conversation.response_format == "text":
        return
    if conversation.response_format == "json_schema" and not isinstance(conversation.response_schema, dict):
        shown = json.dumps(conversation.response_schema)  # `true` allows anything, `false` nothing
        raise RequestError(400, f"Invalid schema for {field}: {shown}; allowed: a JSON object", param=field)
    if conversation.response_format == "regex" and not conversation.response_regex:
        raise RequestError(400, f"Invalid regex for {field}: ''; allowed: a text of at least 1 character", param=field)
    if conversation.messages and conversation.messages[-1].prefix:
        raise unavailable(field, "an answer that continues a given beginning has no form of its own")
    if conversation.response_format == "regex" and conversation.tools:
        raise unavailable(field, "beside tools an answer is text or JSON")


def _refuse_choice(structure: Structure, conversation: recipe.Conversation) -> None:
    """RequestError for a call that is to be made of no tool, or of one that is not offered to the model."""
    offered, choice = [tool.name for tool in conversation.tools], structure.tool_choice
    if isinstance(choice, Mapping):
        if choice["name"] not in offered:
            raise unavailable("tool_choice", f"the model is offered no tool {choice['name']!r}")
    elif choice == "required" and not offered:
        raise unavailable("tool_choice", "the model is offered no tool that it could call")
