"""Tools that Anthropic defines and the client runs (shell, text editor, computer, memory), as ordinary tools.

A request names them by a dated type only; the model is told their parameters.
"""

from __future__ import annotations

import re
from typing import Any, cast

from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid

_TEXT = {"type": "string"}
_POINT = {"type": "array", "items": {"type": "integer"}, "description": "x and y, in pixels from the top left"}
_LINES = {"type": "array", "items": {"type": "integer"}, "description": "First and last line, from 1; -1: to the end"}
_EDITOR = {
    "path": {**_TEXT, "description": "Of the file or folder, from the root"},
    "file_text": {**_TEXT, "description": "create: content of the file"},
    "old_str": {**_TEXT, "description": "str_replace: the text to be replaced, which occurs once in the file"},
    "new_str": {**_TEXT, "description": "str_replace: the text in its place"},
    "insert_line": {"type": "integer", "description": "insert: the line after which the text is put; 0: at the top"},
    "insert_text": {**_TEXT, "description": "insert: the text"},
    "view_range": {**_LINES, "description": "view: first and last line, from 1; -1: to the end"},
}
_DATE = re.compile(r"\d{8}")
_LATER_EDITOR, _LATER_COMPUTER, _ZOOMING_COMPUTER = "20250429", "20250124", "20251124"
_ACTIONS = (
    *("screenshot", "cursor_position", "mouse_move", "left_click", "right_click", "middle_click", "double_click"),
    *("left_click_drag", "type", "key"),
)
_LATER_ACTIONS = ("triple_click", "left_mouse_down", "left_mouse_up", "scroll", "hold_key", "wait")


def ordinary_tools(tools: object) -> object:
    """Tools of a Messages request with those that the client runs as plain ones; what is no list stays.

    RequestError 400, with its place, for such a tool under a name that is not its own.
    """
    if not isinstance(tools, list):
        return tools
    return [_ordinary(tool, f"tools[{place}]") for place, tool in enumerate(cast("list[object]", tools))]


def _ordinary(tool: object, place: str) -> object:
    if not isinstance(tool, dict):
        return tool
    fields = cast(Json, tool)
    kind = fields.get("type")
    if kind in ("custom", None):
        return {name: value for name, value in fields.items() if name != "type"}
    family, _, date = kind.rpartition("_") if isinstance(kind, str) else ("", "", "")
    made = {"bash": _shell, "text_editor": _editor, "computer": _computer, "memory": _memory}.get(family)
    if made is None or not _DATE.fullmatch(date):
        return fields
    name = _name(family, date)
    if fields.get("name") != name:
        raise invalid(f"{place}.name", fields.get("name"), f"{name!r}, the only name of {kind}")
    return {name: value for name, value in fields.items() if name != "type"} | made(fields, date)


def _name(family: str, date: str) -> str:
    if family == "text_editor":
        return "str_replace_editor" if date < _LATER_EDITOR else "str_replace_based_edit_tool"
    return family


def _shell(tool: Json, date: str) -> Json:
    properties = {
        "command": {**_TEXT, "description": "The command to run"},
        "restart": {"type": "boolean", "description": "true: start the shell anew instead"},
    }
    return _tool("Runs commands in a shell that stays open between calls.", properties)


def _editor(tool: Json, date: str) -> Json:
    commands = ["view", "create", "str_replace", "insert"]
    properties = dict(_EDITOR)
    if date < _LATER_EDITOR:
        commands.append("undo_edit")
        properties["new_str"] = {**_TEXT, "description": "str_replace, insert: the new text"}
        del properties["insert_text"]
    most = tool.get("max_characters")
    shown = f" At most {most} characters of a file are shown." if type(most) is int else ""
    head = {"command": {"type": "string", "enum": commands}}
    return _tool(f"Views and edits files.{shown}", head | properties, ["command", "path"])


def _computer(tool: Json, date: str) -> Json:
    size = [tool.get(f"display_{side}_px") for side in ("width", "height")]
    shown = f" The screen is {size[0]} pixels wide and {size[1]} high." if all(type(x) is int for x in size) else ""
    actions = [*_ACTIONS]
    properties: dict[str, Any] = {
        "coordinate": _POINT,
        "start_coordinate": {**_POINT, "description": "left_click_drag: where it begins"},
        "text": {**_TEXT, "description": "type: the text; key: the keys, like ctrl+s"},
    }
    if date >= _LATER_COMPUTER:
        actions += _LATER_ACTIONS
        properties["text"] = {**_TEXT, "description": "type: the text; key, hold_key: the keys, like ctrl+s"}
        properties["scroll_direction"] = {"type": "string", "enum": ["up", "down", "left", "right"]}
        properties["scroll_amount"] = {"type": "integer"}
        properties["duration"] = {"type": "number", "description": "hold_key, wait: seconds"}
    if date >= _ZOOMING_COMPUTER and tool.get("enable_zoom") is True:
        actions.append("zoom")
        properties["region"] = {**_LINES, "description": "zoom: left, top, right, bottom"}
    head = {"action": {"type": "string", "enum": actions}}
    return _tool(f"Uses mouse, keyboard and screen of a computer.{shown}", head | properties, ["action"])


def _memory(tool: Json, date: str) -> Json:
    commands = ["view", "create", "str_replace", "insert", "delete", "rename"]
    paths = {name: {**_TEXT, "description": f"rename: the {name[:3]} path"} for name in ("old_path", "new_path")}
    head = {"command": {"type": "string", "enum": commands}}
    text = "Files below /memories, which last from one conversation to the next."
    return _tool(text, head | _EDITOR | paths, ["command"])


def _tool(description: str, properties: dict[str, Any], required: list[str] | None = None) -> Json:
    schema: Json = {"type": "object", "properties": properties}
    return {"description": description, "input_schema": schema | ({"required": required} if required else {})}
