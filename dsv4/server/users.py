"""Users of a request: whom the engine is shared among fairly. A key counts only where it was checked."""

from __future__ import annotations

from typing import cast

from starlette.types import Scope

from dsv4.server.unchecked_json import Json

MAX_NAME = 512  # characters that tell users apart, the hosted API's limit
_KEY = "dsv4.api_key"


def remember_key(scope: Scope, key: str) -> None:
    """Notes the key that a request was let in with."""
    scope[_KEY] = key


def key_of(scope: Scope) -> str:
    """The key that a request was let in with; empty on a server without keys."""
    return scope.get(_KEY, "")


def user_of(request: Json) -> str:
    """The user that a body names, in DeepSeek's, OpenAI's or Anthropic's field; empty if it names none."""
    metadata = request.get("metadata")
    inner = cast(Json, metadata).get("user_id") if isinstance(metadata, dict) else None
    for name in (request.get("user_id"), request.get("user"), inner):
        if isinstance(name, (str, int, float)) and str(name):
            return str(name)[:MAX_NAME]
    return ""
