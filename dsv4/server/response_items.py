"""Input items of the Responses API, in the form and order that deepseek-recipe accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

from dsv4.server.errors import RequestError
from dsv4.server.sealed_reasoning import unseal
from dsv4.server.unchecked_json import Json, json_objects

_CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")


def as_items(given: object) -> list[object]:
    """`input` of a request as items: a text is a message of the user. Other values are one item, to be refused."""
    if given is None:
        return []
    if isinstance(given, list):
        return cast("list[object]", given)
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [given]


def read_items(items: list[object], offset: int = 0) -> list[object]:
    """Items with sealed reasoning read and refusals as text; outputs follow their calls.

    `offset`: number of items before those that the client has sent. RequestError for damaged reasoning.
    """
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            continue
        fields = cast(Json, item)
        if fields.get("type") == "reasoning":
            _read_reasoning(fields, f"input[{index - offset}]")
        elif fields.get("type") == "custom_tool_call" and isinstance(fields.get("namespace"), str):
            _read_custom_call(fields)
        elif fields.get("role") is not None:
            _read_parts(fields)
    return list(_in_order(items))


def _read_reasoning(item: Json, place: str) -> None:
    sealed = item.get("encrypted_content")
    if item.get("content") or not isinstance(sealed, str):
        return
    try:
        text = unseal(sealed)
    except ValueError as error:
        field = f"{place}.encrypted_content"
        raise RequestError(400, f"Invalid {field}: {error}. Send it as it was received", param=field) from error
    if text is not None:
        item["content"] = [{"type": "reasoning_text", "text": text}]


def _read_custom_call(item: Json) -> None:
    """Makes a namespace's custom call one of its function: deepseek-recipe would drop the namespace."""
    if isinstance(item.get("input"), str):
        item |= {"type": "function_call", "arguments": json.dumps({"input": item.pop("input")}, ensure_ascii=False)}


def _read_parts(message: Json) -> None:
    """Makes refusals and the `text` parts of Chat Completions text of the role."""
    kind = "output_text" if message.get("role") == "assistant" else "input_text"
    for part in json_objects(message.get("content")):
        if part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
            part |= {"type": kind, "text": part.pop("refusal")}
        elif part.get("type") == "text":
            part["type"] = kind


def _in_order(items: list[object]) -> Iterator[object]:
    """Items with every output directly after the group of its call; an output without a call stays where it is.

    Items that are in order keep it.
    """
    outputs: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        if kind_of(item) in OUTPUTS:
            outputs.setdefault(_call_id(item), []).append(index)
    moved: set[int] = set()
    group: list[object] = []  # ids of adjacent calls
    for index, item in enumerate([*items, None]):
        if kind_of(item) in _CALLS:
            group.append(_call_id(item))
            yield item
            continue
        ready = sorted(found[0] for found in map(outputs.get, group) if found)
        for place in (place for place in ready if place not in moved):
            moved.add(place)
            yield items[place]
        group = []
        if index < len(items) and index not in moved:
            yield item


def kind_of(item: object) -> object:
    """`type` of an item; None for what has none."""
    return cast(Json, item).get("type") if isinstance(item, dict) else None


def _call_id(item: object) -> object:
    found = cast(Json, item).get("call_id")
    return found if isinstance(found, str) else None
