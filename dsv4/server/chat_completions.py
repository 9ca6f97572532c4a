"""POST /chat/completions: DeepSeek's Chat Completions API.

JSON, JSON of a schema and tool calls are enforced, while the model thinks too, which the hosted service refuses.
"""

from __future__ import annotations

from typing import cast

import deepseek_recipe as recipe

from dsv4.conversation.structure import Structure
from dsv4.server.errors import RequestError
from dsv4.server.leniency import strip_context_suffix
from dsv4.server.paths import OPENAI_BASES, under
from dsv4.server.progress import Reports, requested_reports
from dsv4.server.recipe_format import RecipeFormat
from dsv4.server.schemas import ChatAnswer, ChatBody
from dsv4.server.structures import of_chat
from dsv4.server.template_options import template_options
from dsv4.server.unchecked_json import Json, json_objects
from dsv4.server.wishes import NO_GRAMMAR, invalid, refuse_sampling, refuse_wishes

_WISHES = {
    "logit_bias": "this server adds no bias to logits",
    "audio": "this server answers with text only",
    "functions": "declare functions in `tools`",
    "function_call": "choose a function with `tool_choice`",
    "web_search_options": "this server has no web search",
    "min_tokens": "this server has no minimum length of answers",
    "stop_token_ids": "this server stops at strings only, given in `stop`",
    "bad_words": "this server excludes no words from answers",
    "logits_processors": "this server does not process logits",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), NO_GRAMMAR),
    "output_format": NO_GRAMMAR,
    **dict.fromkeys(("structured_outputs", "regex", "ebnf", "grammar", "json_schema"), NO_GRAMMAR),
    "use_beam_search": "this server samples answers",
    "prompt_logprobs": "this server has log-probabilities of answers only",
    "echo": "this server does not repeat the prompt in the answer",
    "include_stop_str_in_output": "this server ends an answer before its stop string",
    "truncate_prompt_tokens": "this server does not truncate prompts",
    "continue_final_message": "begin an answer with `prefix` in the last message",
}


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

    def adapt(self, request: Json) -> None:
        """Accepts other servers' dialects: max_completion_tokens, role developer, thinking switches, history fields."""
        _refuse_wishes(request)
        strip_context_suffix(request)
        if request.get("max_tokens") is None and request.get("max_completion_tokens") is not None:
            request["max_tokens"] = request["max_completion_tokens"]
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
    """vLLM's chat_template_kwargs and enable_thinking set thinking and effort where the request does not."""
    wanted = template_options(request)
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


def _refuse_wishes(request: Json) -> None:
    """RequestError 400 for Chat Completions parameters that this server does not implement."""
    modalities = request.get("modalities")
    if isinstance(modalities, list) and any(kind != "text" for kind in cast("list[object]", modalities)):
        raise invalid("modalities", cast(object, modalities), '["text"]')
    refuse_wishes(request, _WISHES)
    if request.get("best_of") not in (None, 1):
        raise invalid("best_of", request["best_of"], "1; several candidates are computed in Completions only")
    refuse_sampling(request)
