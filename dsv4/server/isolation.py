"""Isolation of stored prefixes: one that is there answers faster, which tells others that someone sent it."""

from __future__ import annotations

import hashlib
import json

from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid


def cache_salt(sharing: str, key: str | None, user: str | None, salt: str | None) -> str | None:
    """Salt of a request's prefixes, shared by those of one salt. None: shared by all that have none.

    `sharing`: "all", "key" (one API key), or "user" (one key and user id). `salt`: the request's own, which restricts
    further. Keys do not stand in it.
    """
    parts = [key if sharing != "all" else None, user if sharing == "user" else None, salt]
    return None if parts == [None] * 3 else hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def requested_salt(request: Json) -> str | None:
    """`cache_salt` of a request, as in vLLM. RequestError 400 for what is no text."""
    salt = request.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise invalid("cache_salt", salt, "a text of at least 1 character")
    return salt
