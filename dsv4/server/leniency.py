"""Leniency: adapts request bodies that clients send, but DeepSeek's API refuses, to the form that it accepts.

Each format lists its changes; a body without changes passes through as the received bytes, so that the positions in
deepseek-recipe's errors are right. Fields that deepseek-recipe would silently drop are read or refused: see
content_parts.py and wishes.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from dsv4.server.content_parts import refuse_parts
from dsv4.server.model_names import without_context_suffix
from dsv4.server.size_limits import check_sizes
from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import Sampling


@dataclass(frozen=True)
class Adapted:
    """A body that deepseek-recipe can read, and the parts of it that deepseek-recipe does not read."""

    body: bytes
    sampling: Sampling = field(default_factory=Sampling)
    request: Json = field(default_factory=dict[str, Any])  # as received


def adapt_body(body: bytes, change: Callable[[Json], None]) -> Adapted:
    """Applies `change`, which works in place, to a body's JSON; an unchanged body keeps its bytes.

    RequestError for a message part or parameter that this server does not support, or a request beyond size_limits.py.
    """
    try:
        request: object = json.loads(body)
    except (ValueError, RecursionError):
        return Adapted(body)  # deepseek-recipe will raise the error
    if not isinstance(request, dict):
        return Adapted(body)
    original = cast(Json, request)
    check_sizes(original)  # before the copy, which takes as much again
    try:
        adapted = cast(Json, _copy(original))
    except RecursionError:
        return Adapted(body)
    refuse_parts(original)
    change(adapted)
    sampling = Sampling.of(original)
    return Adapted(body if adapted == original else json.dumps(adapted).encode(), sampling, original)


def _copy(value: object) -> object:
    """The value with objects and arrays of its own. JSON has each once: copy.deepcopy's notes would take gigabytes."""
    if isinstance(value, dict):
        return {name: _copy(field) for name, field in cast(Json, value).items()}
    return [_copy(item) for item in cast("list[object]", value)] if isinstance(value, list) else value


def strip_context_suffix(request: Json) -> None:
    """Strips Claude Code's request for the long context from the model name."""
    model = request.get("model")
    if isinstance(model, str):
        request["model"] = without_context_suffix(model)
