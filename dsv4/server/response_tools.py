"""Tools of the Responses API as functions: deepseek-recipe knows functions, namespaces of them, and apply_patch."""

from __future__ import annotations

import json
from typing import Any, cast

import deepseek_recipe as recipe

from dsv4.server.custom_tools import as_function, input_form, is_custom
from dsv4.server.model_names import VERSION
from dsv4.server.unchecked_json import Json, json_objects
from dsv4.server.wishes import unavailable

_NO_TOOL = "this server has no such tool; declare one of your own as a function or a custom tool"
# Types of tools that run in OpenAI's service, or that only its models know -> the reason of the refusal.
_HOSTED = {
    "mcp": "this server calls no other servers",
    "file_search": "this server stores no files",
    "code_interpreter": "this server runs no code",
    **dict.fromkeys(("computer", "computer_use", "computer_use_preview"), _NO_TOOL),
    **dict.fromkeys(("local_shell", "shell", "apply_patch"), _NO_TOOL),
}


def refuse_hosted(tools: object) -> None:
    """RequestError 400, with its place, for a tool that the model would not be offered.

    Not for those that agents declare unasked (web search, image generation, search of tools), nor for unknown ones:
    they are dropped, as by the hosted service.
    """
    if isinstance(tools, list):
        for place, tool in enumerate(json_objects(cast(object, tools))):
            reason = _HOSTED.get(str(tool.get("type")))
            if reason is not None:
                raise unavailable(f"tools[{place}]", f"{tool['type']}: {reason}")


def chosen(tools: object, choice: object) -> tuple[object, object]:
    """(tools, tool_choice) of a request: only the tools that the choice allows, and a choice in a known form.

    A choice of a namespace's tool gets the name that the model knows.
    """
    if isinstance(choice, dict) and cast(Json, choice).get("type") == "allowed_tools":
        fields = cast(Json, choice)
        allowed = [tool_key(tool) for tool in json_objects(fields.get("tools"))]
        return [tool for tool in json_objects(tools) if tool_key(tool) in allowed], cast(object, fields.get("mode"))
    if isinstance(choice, dict) and cast(Json, choice).get("type") in ("function", "custom"):
        return tools, _as_function_choice(cast(Json, choice), tools)
    return tools, cast(object, choice)


def as_functions(tools: object, choice: object) -> tuple[object, object]:
    """(tools, tool_choice) as of `chosen`, with custom tools as functions."""
    tools, choice = chosen(tools, choice)
    if isinstance(tools, list):
        tools = [_with_functions(tool) for tool in cast("list[object]", tools)]
    return tools, choice


def without_refused_strict(tools: object, text: object = None) -> object:
    """Tools without `strict` if only some have it, or `text` wants JSON: deepseek-recipe refuses that.

    The engine enforces it anyway.
    """
    inner = [one for tool in json_objects(tools) for one in json_objects(tool.get("tools"))]
    callable_tools = [tool for tool in [*json_objects(tools), *inner] if tool.get("type") in ("function", "custom")]
    mixed = len({tool.get("strict") is True for tool in callable_tools}) == 2
    if isinstance(tools, list) and (mixed or _wants_json(text)):
        return [_without_strict(tool) for tool in cast("list[object]", tools)]
    return cast(object, tools)


def flattened(tools: object) -> list[Json]:
    """Functions, those of namespaces under the names that deepseek-recipe gives them, and custom tools as functions.

    ConversionError and ValueError as of deepseek-recipe.
    """
    names = _names_in_namespaces(tools)
    flat: list[Json] = []
    for tool in json_objects(tools):
        if tool.get("type") == "namespace":
            for one in json_objects(tool.get("tools")):
                known = _engine_tool(one)
                flat += [] if known is None else [known | {"name": names.get((tool.get("name"), one.get("name")))}]
        elif (known := _engine_tool(tool)) is not None:
            flat.append(known)
    return flat


def tool_key(tool: Json) -> tuple[object, object]:
    """Type and name, which tell a tool from the others of its request."""
    return tool.get("type"), tool.get("name")


def _engine_tool(tool: Json) -> Json | None:
    if tool.get("type") == "custom":
        return {"name": tool.get("name"), **input_form(tool)}
    return tool if tool.get("type") == "function" else None


def _names_in_namespaces(tools: object) -> dict[tuple[object, object], str]:
    """(namespace, name) of a tool -> the name that the model knows."""
    if not any(tool.get("type") == "namespace" for tool in json_objects(tools)):
        return {}
    functions = [_with_functions(tool) for tool in cast("list[object]", tools)]
    body = json.dumps({"model": "x", "input": "x", "tools": without_refused_strict(functions)})
    options = recipe.ConversionOptions().with_model_alias("x", VERSION)
    found = recipe.ResponsesRequest(body.encode()).namespace_tool_map(options)
    return {place: name for name, place in found.items()}


def _as_function_choice(choice: Json, tools: object) -> Json:
    space = choice.get("namespace")
    if space is not None:
        try:
            names = _names_in_namespaces(tools)
        except (recipe.ConversionError, ValueError):  # raised again where the tools are read
            return choice
        return {"type": "function", "name": names.get((space, choice.get("name")), f"{space}.{choice.get('name')}")}
    return choice | {"type": "function"} if is_custom(choice) else choice


def _with_functions(tool: object) -> object:
    space = cast(Json, tool) if isinstance(tool, dict) else {}
    if space.get("type") != "namespace":
        return as_function(cast(object, tool))
    inner = space.get("tools")
    if not isinstance(inner, list):
        return space
    return space | {"tools": [as_function(one, str(space.get("name"))) for one in cast("list[Any]", inner)]}


def _wants_json(text: object) -> bool:
    form = cast(Json, text).get("format") if isinstance(text, dict) else None
    return isinstance(form, dict) and cast(Json, form).get("type") in ("json_object", "json_schema")


def _without_strict(tool: object) -> object:
    if not isinstance(tool, dict):
        return tool
    fields = {name: value for name, value in cast(Json, tool).items() if name != "strict" or value is not True}
    if isinstance(fields.get("tools"), list):
        fields["tools"] = [_without_strict(one) for one in cast("list[object]", fields["tools"])]
    return fields
