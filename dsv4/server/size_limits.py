"""Limits on what a request may hold beside its bytes: messages, tools, and the size and depth of JSON schemas.

Real requests stay far below. Beyond them lies work that no answer needs: each message, tool and branch of a schema is
validated, rendered and compiled. Nesting of the body as a whole is bounded by deepseek-recipe's parser, at 128.
"""

from __future__ import annotations

import json
from typing import Any, cast

from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json

MAX_MESSAGES = 50_000  # items of the Responses API's input too
MAX_TOOLS = 1024
MAX_SCHEMA_BYTES = 1 << 18  # of each tool, and of the form of an answer
MAX_SCHEMA_DEPTH = 64
_FORMS = ("response_format", "output_config", "output_format", "text")


def check_sizes(request: Json) -> None:
    """RequestError 400, with the place, for a request beyond a limit."""
    for name, most in (("messages", MAX_MESSAGES), ("input", MAX_MESSAGES), ("tools", MAX_TOOLS)):
        items = request.get(name)
        if isinstance(items, list) and len(cast("list[object]", items)) > most:
            count = len(cast("list[object]", items))
            raise RequestError(400, f"{name} has {count} elements; allowed: {most}", param=name)
    tools = request.get("tools")
    if isinstance(tools, list):
        for place, tool in enumerate(cast("list[object]", tools)):
            _check_schema(tool, f"tools[{place}]")
    for name in _FORMS:
        if isinstance(request.get(name), dict):
            _check_schema(request[name], name)


def _check_schema(value: object, place: str) -> None:
    depth, level = 0, _inner(value)
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            message = f"{place} is nested more than {MAX_SCHEMA_DEPTH} levels deep; allowed: {MAX_SCHEMA_DEPTH}"
            raise RequestError(400, message, param=place)
        level = [inner for container in level for inner in _inner(container)]
    size = len(json.dumps(value))
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(400, f"{place} has {size} bytes of JSON; allowed: {MAX_SCHEMA_BYTES}", param=place)


def _inner(value: object) -> list[Any]:
    """Objects and arrays directly in a value."""
    parts: list[object] = []
    if isinstance(value, dict):
        parts = list(cast(Json, value).values())
    elif isinstance(value, list):
        parts = cast("list[object]", value)
    return [part for part in parts if isinstance(part, (dict, list))]
