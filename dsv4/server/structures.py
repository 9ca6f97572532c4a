"""Reads from request bodies which form the answer has to have: tools, tool choice, schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from dsv4.conversation.structure import Structure
from dsv4.server.unchecked_json import Json, json_objects
from dsv4.server.wishes import invalid
from dsv4.tools import Tool, ToolChoice, is_name

_LONG = re.compile(r"\d{19}")


def of_chat(request: Json) -> Structure:
    """Structure of a Chat Completions request; its response_format is deepseek-recipe's to read."""
    choice = request.get("tool_choice")
    fields = [(tool, _object(tool.get("function"))) for tool in json_objects(request.get("tools"))]
    return Structure(
        _tools([(function.get("name"), function.get("parameters"), function.get("strict")) for _, function in fields]),
        _named(_object(_object(choice).get("function"))) or _choice(choice),
        request.get("parallel_tool_calls") is not False,
    )


def of_messages(request: Json) -> Structure:
    """Structure of a Messages request. RequestError for a form, or a `strict`, of the wrong kind."""
    choice, tools = _object(request.get("tool_choice")), json_objects(request.get("tools"))
    for place, tool in enumerate(tools):
        if not isinstance(tool.get("strict"), (bool, type(None))):
            raise invalid(f"tools[{place}].strict", tool["strict"], "true and false")
    kind = {"any": "required", "tool": "required"}.get(str(choice.get("type")), choice.get("type"))
    named = _named(choice) if choice.get("type") == "tool" else None
    return Structure(
        _tools([(tool.get("name"), tool.get("input_schema"), tool.get("strict")) for tool in tools]),
        named or _choice(kind),
        choice.get("disable_parallel_tool_use") is not True,
        _format(request),
        _arguments(request),
    )


def of_responses(functions: list[Json], choice: object, parallel: object) -> Structure:
    """Structure of a Responses request whose tools are functions; its text.format is deepseek-recipe's to read."""
    tools = _tools([(tool.get("name"), tool.get("parameters"), tool.get("strict")) for tool in functions])
    grammars = {tool.get("name"): cast("str | None", tool.get("input_grammar")) for tool in functions}
    tools = tuple(replace(tool, input_grammar=grammars[tool.name]) for tool in tools)
    made = Structure(tools, _named(_object(choice)) or _choice(choice), parallel is not False)
    if not made.restricts_calls:
        return made
    texts = {tool.get("name") for tool in functions if tool.get("free_text")}
    return replace(made, tools=tuple(replace(tool, strict=tool.strict or tool.name in texts) for tool in tools))


def _format(request: Json) -> Json | None:
    """Schema of `output_config.format`, or of `output_format`, its name in the beta. RequestError for another form."""
    for place, value in (
        ("output_config.format", _object(request.get("output_config")).get("format")),
        ("output_format", request.get("output_format")),
    ):
        if value is None:
            continue
        form = _object(value)
        if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
            raise invalid(place, value, '{"type": "json_schema", "schema": {...}}')
        return cast(Json, form["schema"])
    return None


def _arguments(request: Json) -> tuple[tuple[str, str], ...]:
    """Ids and inputs of all earlier calls, if an integer in one of them is long; else nothing."""
    blocks = [
        block
        for message in json_objects(request.get("messages"))
        for block in json_objects(message.get("content"))
        if block.get("type") == "tool_use"
    ]
    texts = [(str(block.get("id")), json.dumps(block.get("input"), ensure_ascii=False)) for block in blocks]
    return tuple(texts) if any(_LONG.search(text) for _, text in texts) else ()


def _tools(tools: list[tuple[object, object, object]]) -> tuple[Tool, ...]:
    """The tools that have a usable name; all others are deepseek-recipe's to refuse or to drop."""
    return tuple(
        Tool(name, cast(Json, schema) if isinstance(schema, dict) else None, strict is True)
        for name, schema, strict in tools
        if isinstance(name, str) and is_name(name)
    )


def _choice(value: object) -> ToolChoice:
    return value if value in ("required", "none") else "auto"  # pyright: ignore[reportReturnType]


def _named(choice: Mapping[str, object]) -> ToolChoice | None:
    return {"name": choice["name"]} if isinstance(choice.get("name"), str) else None


def _object(value: object) -> Json:
    return cast(Json, value) if isinstance(value, dict) else {}
