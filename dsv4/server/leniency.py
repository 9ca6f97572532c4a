"""Request bodies that DeepSeek's API refuses and that clients send anyway, put into the form it accepts.

Everything else passes through untouched, as the bytes that came, so that deepseek-recipe's errors point at them. Images
are refused here: deepseek-recipe would put a note in their place, and the model would answer without having seen them.
So are response formats that nothing enforces.
"""

from __future__ import annotations

import copy
import json
from typing import Any, cast

from dsv4.server.errors import RequestError
from dsv4.server.message_threads import refuse_threads

Json = dict[str, Any]


def adapt_chat(body: bytes) -> bytes:
    """POST /chat/completions: see `_adapt_chat`."""
    return _adapt(body, _adapt_chat)


def adapt_messages(body: bytes) -> bytes:
    """POST /messages: see `_adapt_messages`."""
    return _adapt(body, _adapt_messages)


def _adapt(body: bytes, change: Any) -> bytes:
    try:
        request: object = json.loads(body)
        copied: object = copy.deepcopy(request)  # gives up at fewer levels than json
    except (ValueError, RecursionError):
        return body  # deepseek-recipe words the error
    if not isinstance(request, dict):
        return body
    original, adapted = cast(Json, request), cast(Json, copied)
    _refuse_images(original)
    change(adapted)
    return body if adapted == original else json.dumps(adapted).encode()


def _refuse_constraints(request: Json) -> None:
    """No grammar holds an answer to a schema or a pattern; an answer that ignores it would pass for one that does."""
    form = request.get("response_format")
    kind = cast(Json, form).get("type") if isinstance(form, dict) else None
    if kind in ("json_schema", "regex"):
        raise RequestError(
            400, f"This response_format type is unavailable now: {kind!r}; text and json_object are available"
        )


def _adapt_chat(request: Json) -> None:
    """Role developer is system; max_completion_tokens is max_tokens; vLLM's chat_template_kwargs and enable_thinking.

    In the history, `reasoning` is reasoning_content and a tool call without a type is a function call.
    """
    _refuse_constraints(request)
    _strip_context_suffix(request)
    if request.get("max_tokens") is None and request.get("max_completion_tokens") is not None:
        request["max_tokens"] = request["max_completion_tokens"]
    template = request.get("chat_template_kwargs")
    options = cast(Json, template) if isinstance(template, dict) else {}
    if request.get("thinking") is None:
        for switch in (options.get("thinking"), options.get("enable_thinking"), request.get("enable_thinking")):
            if isinstance(switch, bool):
                request["thinking"] = {"type": "enabled" if switch else "disabled"}
                break
    if request.get("reasoning_effort") is None and options.get("reasoning_effort") is not None:
        request["reasoning_effort"] = options["reasoning_effort"]
    for message in _objects(request.get("messages")):
        if message.get("role") == "developer":
            message["role"] = "system"
        if message.get("role") == "assistant":
            if message.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
                message["reasoning_content"] = message["reasoning"]
            for call in _objects(message.get("tool_calls")):
                if "function" in call:
                    call.setdefault("type", "function")


def _adapt_messages(request: Json) -> None:
    """Tools of type custom are plain tools; redacted_thinking blocks are skipped, nobody here can read them."""
    refuse_threads(request)
    _strip_context_suffix(request)
    for tool in _objects(request.get("tools")):
        if tool.get("type") in ("custom", None):
            tool.pop("type", None)
    for message in _objects(request.get("messages")):
        content = message.get("content")
        if isinstance(content, list):
            blocks = cast("list[object]", content)
            kept = [block for block in blocks if not _is_redacted(block)]
            if len(kept) != len(blocks):
                message["content"] = kept or ""  # an empty array would be refused, an empty text is not


def _refuse_images(request: Json) -> None:
    for message in _objects(request.get("messages")):
        for part in _objects(message.get("content")):
            inner = _objects(part.get("content")) if part.get("type") == "tool_result" else []
            for candidate in (part, *inner):
                if candidate.get("type") in ("image", "image_url", "input_image"):
                    raise RequestError(400, "This model does not support image")


def _strip_context_suffix(request: Json) -> None:
    """Claude Code asks for the long context with a suffix on the model's name; the context is always the whole one."""
    model = request.get("model")
    if isinstance(model, str):
        request["model"] = model.removesuffix("[1m]")


def _is_redacted(block: object) -> bool:
    return isinstance(block, dict) and cast(Json, block).get("type") == "redacted_thinking"


def _objects(value: object) -> list[Json]:
    """The JSON objects of an array; an empty list for anything else."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast(Json, item) for item in items if isinstance(item, dict)]
