"""Tools of the Responses API as functions: deepseek-recipe knows functions, namespaces of them, and apply_patch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import deepseek_recipe as recipe

from dsv4.server.model_names import VERSION
from dsv4.server.unchecked_json import Json, json_objects

_KNOWN = "apply_patch"  # the custom tool that deepseek-recipe reads and writes itself
INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def custom_names(request: Json) -> frozenset[str]:
    """Names of the custom tools that are offered to the model as functions with one parameter, `input`."""
    tools = json_objects(request.get("tools"))
    return frozenset(str(tool["name"]) for tool in tools if tool.get("name") and _is_custom(tool))


def as_functions(tools: object, choice: object) -> tuple[object, object]:
    """(tools, tool_choice) of a request with custom tools as functions, and only the tools that the choice allows."""
    if isinstance(choice, dict) and cast(Json, choice).get("type") == "allowed_tools":
        fields = cast(Json, choice)
        allowed = [tool_key(tool) for tool in json_objects(fields.get("tools"))]
        tools = [tool for tool in json_objects(tools) if tool_key(tool) in allowed]
        choice = cast(object, fields.get("mode"))
    elif isinstance(choice, dict) and _is_custom(cast(Json, choice)):
        choice = cast(Json, choice) | {"type": "function"}
    if isinstance(tools, list):
        tools = [_as_function(tool) for tool in cast("list[object]", tools)]
    return cast(object, tools), cast(object, choice)


def without_mixed_strict(tools: object) -> object:
    """Tools without `strict` if only some have it, which deepseek-recipe refuses; the engine enforces it anyway."""
    inner = [one for tool in json_objects(tools) for one in json_objects(tool.get("tools"))]
    callable_tools = [tool for tool in [*json_objects(tools), *inner] if tool.get("type") in ("function", "custom")]
    mixed = len({tool.get("strict") is True for tool in callable_tools}) == 2
    return [_without_strict(tool) for tool in cast("list[object]", tools)] if mixed else tools


def flattened(tools: object) -> list[Json]:
    """Functions, those of namespaces under the names that deepseek-recipe gives them, and custom tools as functions.

    ConversionError and ValueError as of deepseek-recipe.
    """
    names: dict[tuple[str, str], str] = {}
    if any(tool.get("type") == "namespace" for tool in json_objects(tools)):
        body = json.dumps({"model": "x", "input": "x", "tools": without_mixed_strict(tools)})
        options = recipe.ConversionOptions().with_model_alias("x", VERSION)
        found = recipe.ResponsesRequest(body.encode()).namespace_tool_map(options)
        names = {place: name for name, place in found.items()}
    flat: list[Json] = []
    for tool in json_objects(tools):
        if tool.get("type") == "namespace":
            inner = json_objects(tool.get("tools"))
            flat += [one | {"name": names.get((str(tool.get("name")), str(one.get("name"))))} for one in inner]
        elif tool.get("type") == "custom":
            flat.append({"name": tool.get("name"), "parameters": INPUT})
        elif tool.get("type") == "function":
            flat.append(tool)
    return flat


def tool_key(tool: Json) -> tuple[object, object]:
    """Type and name, which tell a tool from the others of its request."""
    return tool.get("type"), tool.get("name")


def custom_input(arguments: str) -> str:
    """Input of a custom tool in the arguments of its function; the arguments themselves if they are something else."""
    try:
        found: object = json.loads(arguments)
    except ValueError:
        return arguments
    value = cast(Json, found).get("input") if isinstance(found, dict) else None
    return value if isinstance(value, str) else arguments


def _is_custom(tool: Mapping[str, Any]) -> bool:
    return tool.get("type") == "custom" and tool.get("name") != _KNOWN


def _as_function(tool: object) -> object:
    if not isinstance(tool, dict) or not _is_custom(cast(Json, tool)):
        return cast(object, tool)
    custom = cast(Json, tool)
    form = custom.get("format")
    fields = cast(Json, form) if isinstance(form, dict) else {}
    words = [custom.get("description")]
    if isinstance(fields.get("definition"), str):
        words.append(f"`input` has to follow this {fields.get('syntax', 'formal')} grammar:\n{fields['definition']}")
    described = "\n\n".join(text for text in words if isinstance(text, str) and text)
    return {"type": "function", "name": custom.get("name"), "description": described, "parameters": INPUT}


def _without_strict(tool: object) -> object:
    if not isinstance(tool, dict):
        return tool
    fields = {name: value for name, value in cast(Json, tool).items() if name != "strict"}
    if isinstance(fields.get("tools"), list):
        fields["tools"] = [_without_strict(one) for one in cast("list[object]", fields["tools"])]
    return fields
