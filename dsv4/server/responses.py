"""POST /responses: OpenAI's Responses API as DeepSeek implements it.

Beside what the hosted service has: stored responses and `previous_response_id`, any custom tool, enforced forms of
answers, calls that are forced while the model thinks, and histories whose outputs do not directly follow their calls.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import cast

import deepseek_recipe as recipe

from dsv4.conversation.answer import Answer, Generator
from dsv4.conversation.model import ConversationModel
from dsv4.conversation.structure import Structure
from dsv4.conversation.turn import Turn
from dsv4.server.custom_tools import custom_names
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.foreign_fields import read_max_tokens
from dsv4.server.leniency import strip_context_suffix
from dsv4.server.paths import OPENAI_BASES, under
from dsv4.server.recipe_format import RecipeFormat, RecipeRequest, Request
from dsv4.server.response_context import new_items, stored_context, with_ids
from dsv4.server.response_events import Asked, ResponseEvent, ResponseReader, WholeResponse
from dsv4.server.response_fields import LOGPROBS, check_fields, reported_fields, wants_sealed
from dsv4.server.response_items import as_items, read_items
from dsv4.server.response_store import OwnResponses
from dsv4.server.response_tools import as_functions, chosen, flattened, without_refused_strict
from dsv4.server.response_truncation import shortest_cut
from dsv4.server.structures import of_responses
from dsv4.server.template_options import template_options
from dsv4.server.unchecked_json import Json
from dsv4.server.wire_format import AnswerReader, Chunk, WholeAnswer

PATHS = under(OPENAI_BASES, "/responses")


@dataclass(frozen=True)
class _Settings:
    """Of deepseek-recipe's request; `namespaces`: (namespace, name) of a tool by the name that the model knows."""

    echo: recipe.ResponsesEcho
    namespaces: dict[str, tuple[str, str]]
    options: recipe.ConversionOptions


class Responses(RecipeFormat):
    name = "responses"
    paths = ()  # its routes need the store: see response_routes.py
    request = recipe.ResponsesRequest
    response = recipe.ResponsesResponse
    free_tool_choice = "auto"
    format_field = "text.format"

    def __init__(self, own: OwnResponses | None = None) -> None:
        """`own`: the client's stored responses; None: it has none."""
        self._own = own

    def matches(self, path: str) -> bool:
        return path.startswith(tuple(f"{known}/" for known in PATHS)) or path in PATHS

    def new_id(self) -> str:
        return f"resp_{uuid.uuid4().hex}"  # frameworks recognize a response by the beginning of its id

    def user(self, request: Json) -> object:
        return request.get("user") or request.get("safety_identifier")

    def adapt(self, request: Json) -> None:
        """Reads items and tools that deepseek-recipe refuses or drops. RequestError for unsupported parameters."""
        check_fields(request)
        strip_context_suffix(request)
        read_max_tokens(request, "max_output_tokens")
        _read_switches(request)
        if LOGPROBS in (request.get("include") or []) and request.get("top_logprobs") is None:
            request["top_logprobs"] = 0
        before = stored_context(request, self._own)
        if before or isinstance(request.get("input"), list):
            request["input"] = read_items([*before, *new_items(request, self._own)], offset=len(before))
        tools, choice = as_functions(request.get("tools"), request.get("tool_choice"))
        if "tools" in request:
            request["tools"] = without_refused_strict(tools, request.get("text"))
        if "tool_choice" in request:
            request["tool_choice"] = choice

    def structure(self, request: Json) -> Structure:
        tools, choice = chosen(request.get("tools"), request.get("tool_choice"))
        return of_responses(flattened(tools), choice, request.get("parallel_tool_calls"))

    def without_thinking(self, request: Json) -> Json:
        return request | {"reasoning": {"effort": "none"}}

    def settings(self, request: Request, options: recipe.ConversionOptions) -> object:
        given = cast(recipe.ResponsesRequest, request)
        return _Settings(given.echo(), given.namespace_tool_map(options), options)

    def shortened(self, request: RecipeRequest, model: ConversationModel) -> Turn | None:
        if request.received.get("truncation") != "auto":
            return None
        whole = cast(Json, json.loads(self.adapted(json.dumps(request.received).encode()).body))
        options = cast(_Settings, request.settings).options

        def attempt(items: list[object]) -> Turn | None:
            body = json.dumps(whole | {"input": items}).encode()
            try:
                return request.prepared(model, self.converted(body, options, request.structure))
            except recipe.ConversionError:
                return None

        return shortest_cut(as_items(whole.get("input")), attempt)

    def generator(self, request: RecipeRequest, answer_id: str) -> Generator:
        settings = cast(_Settings, request.settings)
        made = recipe.ResponsesRequest.chunk_generator(request.converted, answer_id, request.model)
        return made.with_echo(settings.echo).with_namespace_tool_map(settings.namespaces)

    def reader(self, request: RecipeRequest, answer: Answer, answer_id: str) -> AnswerReader:
        received, own = request.received, self._own
        save = None
        if own is not None and own.keeps and received.get("store") is not False:
            items = with_ids(new_items(received, own), answer_id)
            save = own.saver(items, cast("str | None", received.get("previous_response_id")))
        reported = reported_fields(received, stored=save is not None)
        sealed, custom = wants_sealed(received), custom_names(received)
        return ResponseReader(answer, Asked(answer_id, request.model, reported, sealed, custom), save)

    def whole_answer(self, answer_id: str, model: str, num_prompt_tokens: int) -> WholeAnswer:
        return WholeResponse()

    def event(self, chunk: Chunk) -> Event:
        given = cast(ResponseEvent, chunk)
        return Event(given.to_json(), given.name)

    def failure(self, error: RequestError, reader: AnswerReader) -> Event:
        return self.event(cast(ResponseReader, reader).failed(error))

    def token_count(self, count: int) -> Json:
        return {"object": "response.input_tokens", "input_tokens": count}


RESPONSES = Responses()


def _read_switches(request: Json) -> None:
    """Other APIs' switches set the effort, "none" without thinking, where the request does not."""
    wanted = template_options(request, own=("reasoning",))
    reasoning: object = request.get("reasoning")
    fields = cast(Json, reasoning) if isinstance(reasoning, dict) else {}
    effort = "none" if wanted.thinking is False else wanted.effort
    if effort is not None and (reasoning is None or (isinstance(reasoning, dict) and fields.get("effort") is None)):
        request["reasoning"] = fields | {"effort": effort}
