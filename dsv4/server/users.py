"""The API key of a request, as far as it was checked: whom the engine is shared among, and whose prefixes are whose."""

from __future__ import annotations

from starlette.types import Scope

_KEY = "dsv4.api_key"


def remember_key(scope: Scope, key: str) -> None:
    """Notes the key that a request was let in with."""
    scope[_KEY] = key


def key_of(scope: Scope) -> str:
    """The key that a request was let in with; empty on a server without keys."""
    return scope.get(_KEY, "")
