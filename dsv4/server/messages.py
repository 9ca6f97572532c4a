"""POST /messages and /messages/count_tokens: the Messages API as DeepSeek implements it.

Model names that begin with "claude-" are answered by the served model. Web search declarations are dropped. Unknown
betas, cache marks and citations are ignored.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

import deepseek_recipe as recipe

from dsv4.conversation.structure import Structure
from dsv4.server.client_tools import ordinary_tools
from dsv4.server.content_parts import read_documents
from dsv4.server.errors import RequestError
from dsv4.server.events import Event
from dsv4.server.foreign_fields import check_seed, read_max_tokens, refuse_foreign
from dsv4.server.leniency import strip_context_suffix
from dsv4.server.message_threads import refuse_threads
from dsv4.server.model_names import options_for
from dsv4.server.paths import ANTHROPIC_BASES, under
from dsv4.server.recipe_format import RecipeFormat
from dsv4.server.schemas import CountTokensAnswer, CountTokensBody, MessagesAnswer, MessagesBody
from dsv4.server.structures import of_messages
from dsv4.server.template_options import template_options
from dsv4.server.tool_inputs import ToolInputs
from dsv4.server.unchecked_json import Json, json_objects
from dsv4.server.wire_format import WholeAnswer
from dsv4.server.wishes import invalid

# Status -> error type, if Anthropic's name for it differs.
_ERROR_TYPES = {500: "api_error", 503: "overloaded_error"}
# The hosted service's words for too long a prompt; the prompt's tokens are the second number.
_TOO_LONG = re.compile(r"maximum context length is (\d+) tokens\. .*?\((\d+) in the (?:messages|prompt),", re.DOTALL)


class Messages(RecipeFormat):
    """Events have names; error bodies add Anthropic's types, for its SDK, to DeepSeek's error object."""

    name = "messages"
    paths = under(ANTHROPIC_BASES, "/messages")
    count_tokens_paths = under(ANTHROPIC_BASES, "/messages/count_tokens")
    request_schema, answer_schema = MessagesBody, MessagesAnswer
    count_tokens_schema, token_count_schema = CountTokensBody, CountTokensAnswer
    request = recipe.MessagesRequest
    response = recipe.MessagesResponse
    free_tool_choice = {"type": "auto"}  # noqa: RUF012
    format_field = "output_config.format"

    def structure(self, request: Json) -> Structure:
        return of_messages(request | {"tools": ordinary_tools(request.get("tools"))})

    def user(self, request: Json) -> object:
        metadata = request.get("metadata")
        return cast(Json, metadata).get("user_id") if isinstance(metadata, dict) else None

    def matches(self, path: str) -> bool:
        return path.startswith("/anthropic") or path.rstrip("/").endswith(("/messages", "/count_tokens"))

    def options_for(self, model: str, options: recipe.ConversionOptions) -> recipe.ConversionOptions:
        """Accepts any claude-* model name: clients made for Anthropic's models insist on them."""
        return options_for(model, options, claude=True)

    def adapt(self, request: Json) -> None:
        """Makes tools that the client runs plain tools, and text documents text; drops redacted_thinking blocks.

        RequestError for threads and for unsupported parameters.
        """
        refuse_threads(request)
        refuse_foreign(request, self.name)
        check_seed(request)
        if request.get("n") not in (None, 1):
            raise invalid("n", request["n"], "1; a message is one answer")
        read_documents(request)
        strip_context_suffix(request)
        read_max_tokens(request, "max_tokens")
        _read_switches(request)
        if isinstance(request.get("tools"), list):
            request["tools"] = ordinary_tools(request["tools"])
        for message in json_objects(request.get("messages")):
            content = message.get("content")
            if isinstance(content, list):
                blocks = cast("list[object]", content)
                kept = [block for block in blocks if not _is_redacted(block)]
                if len(kept) != len(blocks):
                    message["content"] = kept or ""  # an empty array would be refused, an empty string is not

    def token_count(self, count: int) -> Json:
        return {"input_tokens": count}

    def whole_answer(self, answer_id: str, model: str, num_prompt_tokens: int) -> WholeAnswer:
        return _WholeMessage(super().whole_answer(answer_id, model, num_prompt_tokens))

    def ping(self) -> bytes:
        return Event('{"type": "ping"}', "ping").encode()

    def error_body(self, error: RequestError) -> Json:
        inner = error.as_object()
        kind = _ERROR_TYPES.get(error.status, inner["type"])
        return {"type": "error", "error": inner | {"type": kind, "message": _with_anthropic_words(error.message)}}

    def error_event(self, error: RequestError) -> Event:
        return Event(json.dumps(self.error_body(error)), "error")


MESSAGES = Messages()


class _WholeMessage:
    """Whole answer whose tool calls have the inputs from the stream events, with all digits."""

    def __init__(self, message: WholeAnswer) -> None:
        self._message = message
        self._inputs = ToolInputs()

    def accumulate(self, chunk: Any) -> None:
        self._inputs.add(chunk.to_json())
        self._message.accumulate(chunk)

    def to_json(self) -> str:
        return self._inputs.restore(self._message.to_json())


def _with_anthropic_words(message: str) -> str:
    """Adds Anthropic's words for too long a prompt, by which Claude Code knows it and compacts the conversation."""
    found = _TOO_LONG.search(message)
    if found is None:
        return message
    most, wanted = found.groups()
    return f"{message} (prompt is too long: {wanted} tokens > {most} maximum)"


def _read_switches(request: Json) -> None:
    """Other APIs' switches set thinking and effort where the request does not."""
    wanted = template_options(request, own=("thinking", "output_config"))
    if request.get("thinking") is None and wanted.thinking is not None:
        request["thinking"] = {"type": "enabled" if wanted.thinking else "disabled"}
    output: object = request.get("output_config")
    fields = cast(Json, output) if isinstance(output, dict) else {}
    if wanted.effort is not None and (output is None or isinstance(output, dict)) and fields.get("effort") is None:
        request["output_config"] = fields | {"effort": wanted.effort}


def _is_redacted(block: object) -> bool:
    return isinstance(block, dict) and cast(Json, block).get("type") == "redacted_thinking"
