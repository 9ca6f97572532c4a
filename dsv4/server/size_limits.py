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
MAX_REFERRED_DEPTH = 1500  # of all that a schema's $refs name, added up: llguidance follows them on the stack
_MAX_ROOTS = 4  # objects with definitions in which a $ref is looked up
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
    depth, roots, references = _measured(value)
    if depth > MAX_SCHEMA_DEPTH:
        message = f"{place} is nested more than {MAX_SCHEMA_DEPTH} levels deep; allowed: {MAX_SCHEMA_DEPTH}"
        raise RequestError(400, message, param=place)
    size = len(json.dumps(value))
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(400, f"{place} has {size} bytes of JSON; allowed: {MAX_SCHEMA_BYTES}", param=place)
    referred = sum(1 + _measured(_named(reference, roots))[0] for reference in references)
    if referred > MAX_REFERRED_DEPTH:
        message = f"the $refs of {place} lead {referred} levels deep; allowed: {MAX_REFERRED_DEPTH}"
        raise RequestError(400, message, param=place)


def _measured(value: object) -> tuple[int, list[Json], set[str]]:
    """(depth, up to one beyond the limit; objects with definitions; different texts of $ref) of a value."""
    depth, level = 0, [value]
    roots: list[Json] = []
    references: set[str] = set()
    while depth <= MAX_SCHEMA_DEPTH:
        for container in level:
            if isinstance(container, dict):
                fields = cast(Json, container)
                roots += [fields] if "$defs" in fields or "definitions" in fields else []
                references |= {fields["$ref"]} if isinstance(fields.get("$ref"), str) else set()
        level = [inner for container in level for inner in _inner(container)]
        if not level:
            break
        depth += 1
    return depth, roots, references


def _named(reference: str, roots: list[Json]) -> object:
    """Target of a reference in the first of `roots` that has it."""
    for root in roots[:_MAX_ROOTS]:
        found: Any = root
        for name in reference.removeprefix("#/").split("/"):
            fields = cast(Json, found if isinstance(found, dict) else {})
            found = fields.get(name)
        if found is not None:
            return cast(object, found)
    return None


def _inner(value: object) -> list[Any]:
    """Objects and arrays directly in a value."""
    parts: list[object] = []
    if isinstance(value, dict):
        parts = list(cast(Json, value).values())
    elif isinstance(value, list):
        parts = cast("list[object]", value)
    return [part for part in parts if isinstance(part, (dict, list))]
