"""Input of a Responses request with what it refers to: the response that it continues, and stored items."""

from __future__ import annotations

import re
from typing import cast

from dsv4.server.errors import RequestError
from dsv4.server.response_items import as_items
from dsv4.server.response_store import NotStoredError, OwnResponses
from dsv4.server.unchecked_json import Json

_OF_RESPONSE = re.compile(r"[a-z]+_(resp_[0-9a-f]+)_")  # the beginning of an item's id
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def stored_context(request: Json, own: OwnResponses | None) -> list[Json]:
    """Items before those of the request: of `previous_response_id`. RequestError if it is not stored."""
    previous = request.get("previous_response_id")
    if not isinstance(previous, str):
        return []
    try:
        if own is None:
            raise NotStoredError(previous)
        return own.context(previous)
    except NotStoredError as error:
        missing = f"Previous response with id '{error.response_id}' not found"
        raise RequestError(400, missing, param="previous_response_id") from error


def new_items(request: Json, own: OwnResponses | None) -> list[object]:
    """Items of the request, stored ones in place of references to them. RequestError for one that is not stored."""
    items = as_items(request.get("input"))
    return [_resolved(item, own, f"input[{index}]") for index, item in enumerate(items)]


def with_ids(items: list[object], response_id: str) -> list[Json]:
    """Items in their full form, as they are stored and listed: each has type and id, content is a list of parts."""
    found: list[Json] = []
    for index, item in enumerate(items):
        fields = dict(cast(Json, item))
        if fields.get("role") is not None:
            fields["type"] = "message"
            if isinstance(fields.get("content"), str):
                kind = "output_text" if fields["role"] == "assistant" else "input_text"
                fields["content"] = [{"type": kind, "text": fields["content"]}]
        if not fields.get("id"):
            fields["id"] = f"{_PREFIXES.get(str(fields.get('type')), 'item')}_{response_id}_in{index}"
        found.append(fields)
    return found


def _resolved(item: object, own: OwnResponses | None, place: str) -> object:
    if not isinstance(item, dict) or cast(Json, item).get("type") != "item_reference":
        return cast(object, item)
    wanted = cast(Json, item).get("id")
    response = _OF_RESPONSE.match(wanted) if isinstance(wanted, str) else None
    try:
        if own is not None and response is not None:
            stored = own.get(response[1])
            return next(known for known in (*stored.output, *stored.items) if known.get("id") == wanted)
    except (NotStoredError, StopIteration):
        pass
    raise RequestError(
        400,
        f"Item with id {wanted!r} not found. Items of a response are stored unless its `store` is false; send the "
        "item itself",
        param=f"{place}.id",
    )
