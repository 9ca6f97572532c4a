"""Custom tools of the Responses API, whose input is text, as functions with one parameter, `input`.

deepseek-recipe knows one of them, apply_patch, outside of namespaces; that stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from dsv4.engine.lark import check_lark, regex_terminal
from dsv4.server.errors import RequestError
from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid

_KNOWN = "apply_patch"
INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def custom_names(request: Json) -> frozenset[tuple[str | None, str]]:
    """(namespace, name) of the custom tools that are offered to the model as functions."""
    found: set[tuple[str | None, str]] = set()
    for _, space, tool in _every_tool(request.get("tools")):
        if is_custom(tool, space) and isinstance(tool.get("name"), str):
            found.add((space, cast(str, tool["name"])))
    return frozenset(found)


def is_custom(tool: Mapping[str, Any], namespace: str | None = None) -> bool:
    """True for a custom tool, or a choice of one, that deepseek-recipe does not know."""
    return tool.get("type") == "custom" and (namespace is not None or tool.get("name") != _KNOWN)


def as_function(tool: object, namespace: str | None = None) -> object:
    """A custom tool as a function, which says the rules of its input; any other tool unchanged."""
    if not isinstance(tool, dict) or not is_custom(cast(Json, tool), namespace):
        return cast(object, tool)
    custom = cast(Json, tool)
    fields = _format(custom)
    words = [custom.get("description")]
    if isinstance(fields.get("definition"), str):
        words.append(f"`input` has to follow this {fields.get('syntax')} grammar:\n{fields['definition']}")
    described = "\n\n".join(text for text in words if isinstance(text, str) and text)
    return {"type": "function", "name": custom.get("name"), "description": described, "parameters": INPUT}


def input_form(tool: Json) -> Json:
    """Fields of the function that a custom tool is to the engine: its `input` has the tool's format.

    `free_text`: any text, which is to be seen to where calls are constrained anyway.
    """
    form = _format(tool)
    if form.get("type") != "grammar":
        return {"parameters": INPUT, "free_text": True}
    if form["syntax"] == "lark":
        return {"parameters": INPUT, "input_grammar": form["definition"]}
    text = {"type": "string", "pattern": f"^({_unanchored(cast(str, form['definition']))})$"}
    return {"parameters": INPUT | {"properties": {"input": text}}, "strict": True}


def custom_input(arguments: str) -> str:
    """Input of a custom tool in the arguments of its function: one that is no text as JSON, none at all as an empty
    text. Arguments without an `input` stay as they are.
    """
    try:
        found: object = json.loads(arguments)
    except ValueError:
        return arguments
    if not isinstance(found, dict):
        return arguments
    fields = cast(Json, found)
    if "input" not in fields:
        return arguments if fields else ""
    value = cast(object, fields["input"])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_formats(tools: object) -> None:
    """RequestError 400, with its place, for a custom tool's format that is none, or a grammar that is wrong."""
    for place, _, tool in _every_tool(tools):
        if tool.get("type") == "custom" and tool.get("format") is not None:
            _check_format(_format(tool), tool["format"], f"{place}.format")


def _check_format(form: Json, given: object, place: str) -> None:
    if not isinstance(given, dict):
        raise invalid(place, given, '{"type": "text"} and {"type": "grammar", ...}')
    if form.get("type") not in ("text", "grammar"):
        raise invalid(f"{place}.type", form.get("type"), "text and grammar")
    if form["type"] == "text":
        return
    if form.get("syntax") not in ("lark", "regex"):
        raise invalid(f"{place}.syntax", form.get("syntax"), "lark and regex")
    if not isinstance(form.get("definition"), str):
        raise invalid(f"{place}.definition", form.get("definition"), "the text of a grammar")
    try:
        lark = form["syntax"] == "lark"
        check_lark(form["definition"] if lark else f"start: {regex_terminal(_unanchored(form['definition']))}")
    except ValueError as error:
        field = f"{place}.definition"
        raise RequestError(400, f"Invalid {field}: {error}", param=field) from error


def _unanchored(regex: str) -> str:
    """A regex of whole texts without the anchors at its ends, which say nothing there."""
    regex = regex.removeprefix("^")
    slashes = len(regex[:-1]) - len(regex[:-1].rstrip("\\"))
    return regex[:-1] if regex.endswith("$") and slashes % 2 == 0 else regex


def _format(tool: Json) -> Json:
    form = tool.get("format")
    return cast(Json, form) if isinstance(form, dict) else {}


def _every_tool(tools: object) -> Iterator[tuple[str, str | None, Json]]:
    """(place, namespace, tool) of the tools, and of those in namespaces."""
    for index, tool in enumerate(cast("list[object]", tools) if isinstance(tools, list) else []):
        if not isinstance(tool, dict):
            continue
        fields, place = cast(Json, tool), f"tools[{index}]"
        yield place, None, fields
        inner = fields.get("tools")
        if fields.get("type") == "namespace" and isinstance(inner, list):
            for number, one in enumerate(cast("list[object]", inner)):
                if isinstance(one, dict):
                    yield f"{place}.tools[{number}]", str(fields.get("name")), cast(Json, one)
