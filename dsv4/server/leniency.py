"""Request bodies that DeepSeek's API refuses and that clients send anyway, put into the form it accepts.

Each format says what it changes; everything else passes through untouched, as the bytes that came, so that
deepseek-recipe's errors point at them. What deepseek-recipe would leave out in silence is read or refused: see
content_parts.py and wishes.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from dsv4.server.content_parts import refuse_parts
from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import Sampling


@dataclass(frozen=True)
class Adapted:
    """A body that deepseek-recipe can read, and what it asks of the sampler beyond what deepseek-recipe reads."""

    body: bytes
    sampling: Sampling = field(default_factory=Sampling)


def adapt_body(body: bytes, change: Callable[[Json], None]) -> Adapted:
    """Reads a body and changes it in place where `change` does. RequestError for what nobody here does."""
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


def strip_context_suffix(request: Json) -> None:
    """Claude Code asks for the long context with a suffix on the model's name; the context is always the whole one."""
    model = request.get("model")
    if isinstance(model, str):
        request["model"] = model.removesuffix("[1m]")
