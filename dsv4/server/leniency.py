"""Request bodies that DeepSeek's API refuses and that clients send anyway, put into the form it accepts.

Everything else passes through untouched, as the bytes that came, so that deepseek-recipe's errors point at them. What
deepseek-recipe would leave out in silence is read or refused: see content_parts.py and wishes.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from dsv4.server.content_parts import read_documents, refuse_parts
from dsv4.server.message_threads import refuse_threads
from dsv4.server.wishes import Sampling, refuse_chat_wishes, refuse_messages_wishes

Json = dict[str, Any]


@dataclass(frozen=True)
class Adapted:
    """A body that deepseek-recipe can read, and what it asks of the sampler beyond what deepseek-recipe reads."""

    body: bytes
    sampling: Sampling = field(default_factory=Sampling)


def adapt_chat(body: bytes) -> Adapted:
    """POST /chat/completions: see `_adapt_chat`."""
    return _adapt(body, _adapt_chat)


def adapt_messages(body: bytes) -> Adapted:
    """POST /messages: see `_adapt_messages`."""
    return _adapt(body, _adapt_messages)


def _adapt(body: bytes, change: Callable[[Json], None]) -> Adapted:
    try:
        request: object = json.loads(body)
        copied: object = copy.deepcopy(request)  # gives up at fewer levels than json
    except (ValueError, RecursionError):
        return Adapted(body)  # deepseek-recipe words the error
    if not isinstance(request, dict):
        return Adapted(body)
    original, adapted = cast(Json, request), cast(Json, copied)
    refuse_parts(original)
    change(adapted)
    sampling = Sampling.of(original)
    return Adapted(body if adapted == original else json.dumps(adapted).encode(), sampling)


def _adapt_chat(request: Json) -> None:
    """Role developer is system; max_completion_tokens is max_tokens; vLLM's chat_template_kwargs and enable_thinking.

    In the history, `reasoning` is reasoning_content and a tool call without a type is a function call.
    """
    refuse_chat_wishes(request)
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
            if not message.get("reasoning_content") and isinstance(message.get("reasoning"), str):
                message["reasoning_content"] = message["reasoning"]
            for call in _objects(message.get("tool_calls")):
                if "function" in call:
                    call.setdefault("type", "function")


def _adapt_messages(request: Json) -> None:
    """Tools of type custom are plain tools; redacted_thinking blocks are skipped, nobody here can read them.

    Documents that are text become text.
    """
    refuse_threads(request)
    refuse_messages_wishes(request)
    read_documents(request)
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
