"""POST /chat/completions: DeepSeek's Chat Completions API.

JSON, JSON of a schema and tool calls are enforced, while the model thinks too, which the hosted service refuses.
"""

from __future__ import annotations

import time
from typing import cast

import deepseek_recipe as recipe

from dsv4.conversation.answer import Answer
from dsv4.conversation.structure import Structure
from dsv4.server.chat_usage import ChatReader, WholeChat
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.foreign_fields import read_max_tokens, refuse_foreign
from dsv4.server.leniency import strip_context_suffix
from dsv4.server.paths import OPENAI_BASES, under
from dsv4.server.progress import Reports, requested_reports
from dsv4.server.recipe_format import RecipeFormat, RecipeRequest
from dsv4.server.schemas import ChatAnswer, ChatBody
from dsv4.server.structures import of_chat
from dsv4.server.template_options import template_options
from dsv4.server.unchecked_json import Json, json_objects
from dsv4.server.wire_format import Chunk

# deepseek-recipe ignores the field in messages of other roles, which the hosted service refuses.
_NO_PREFIX = (
    "Invalid completion message: prefix set true with message which is not final message or message role is not"
    " assistant"
)


class ChatCompletions(RecipeFormat):
    name = "chat.completions"
    paths = under(OPENAI_BASES, "/chat/completions")
    request_schema, answer_schema = ChatBody, ChatAnswer
    request = recipe.ChatCompletionRequest
    response = recipe.ChatCompletionResponse
    free_tool_choice = "auto"

    def reports(self, body: bytes) -> Reports:
        return requested_reports(body)

    def structure(self, request: Json) -> Structure:
        return of_chat(request)

    def user(self, request: Json) -> object:
        return request.get("user_id") or request.get("user")

    def reader(self, request: RecipeRequest, answer: Answer, answer_id: str) -> ChatReader:
        return ChatReader(answer)

    def whole_answer(self, answer_id: str, model: str, num_prompt_tokens: int) -> WholeChat:
        return WholeChat(recipe.ChatCompletionResponse(answer_id, model, int(time.time()), num_prompt_tokens, 0))

    def event(self, chunk: Chunk) -> Event:
        return Event(chunk.to_json())

    def adapt(self, request: Json) -> None:
        """Accepts other servers' dialects: max_completion_tokens, role developer, thinking switches, history fields."""
        refuse_foreign(request, self.name)
        strip_context_suffix(request)
        read_max_tokens(request, "max_tokens")
        _read_switches(request)
        _read_strict(request)
        for place, message in enumerate(json_objects(request.get("messages"))):
            if message.get("prefix") is True and message.get("role") != "assistant":
                raise RequestError(400, _NO_PREFIX, param=f"messages[{place}].prefix")
            if message.get("role") == "developer":
                message["role"] = "system"
            if message.get("role") == "assistant":
                _read_answer(message)


CHAT = ChatCompletions()


def _read_switches(request: Json) -> None:
    """Other APIs' switches set thinking and effort where the request does not."""
    wanted = template_options(request, own=("thinking", "reasoning_effort"))
    if request.get("thinking") is None and wanted.thinking is not None:
        request["thinking"] = {"type": "enabled" if wanted.thinking else "disabled"}
    if request.get("reasoning_effort") is None and wanted.effort is not None:
        request["reasoning_effort"] = wanted.effort


def _read_strict(request: Json) -> None:
    """Drops `strict` of tools beside a form of the text, which deepseek-recipe refuses; the engine enforces both."""
    form = request.get("response_format")
    if isinstance(form, dict) and cast(Json, form).get("type") in ("json_object", "json_schema"):
        for tool in json_objects(request.get("tools")):
            function = tool.get("function")
            if isinstance(function, dict) and cast(Json, function).get("strict") is True:
                del cast(Json, function)["strict"]


def _read_answer(message: Json) -> None:
    """Fixes an assistant message of the history: `reasoning` to reasoning_content, a missing tool call type."""
    if not message.get("reasoning_content") and isinstance(message.get("reasoning"), str):
        message["reasoning_content"] = message["reasoning"]
    for call in json_objects(message.get("tool_calls")):
        if "function" in call:
            call.setdefault("type", "function")
