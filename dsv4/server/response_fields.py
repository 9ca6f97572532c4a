"""Fields of a Responses request that deepseek-recipe does not read: checked, refused, or reported in the response."""

from __future__ import annotations

from typing import Any, cast

from dsv4.server.custom_tools import check_formats
from dsv4.server.foreign_fields import check_seed, refuse_foreign
from dsv4.server.response_schemas import MAX_METADATA
from dsv4.server.response_tools import as_functions, refuse_hosted, tool_key, without_refused_strict
from dsv4.server.unchecked_json import Json, json_objects
from dsv4.server.wishes import invalid, unavailable

SEALED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"


def check_fields(request: Json) -> None:
    """RequestError 400 for a field of the wrong kind, and for one that this server does not support."""
    refuse_foreign(request, "responses")
    check_seed(request)
    for name in ("store", "parallel_tool_calls"):
        if not isinstance(request.get(name), (bool, type(None))):
            raise invalid(name, request[name], "true and false")
    for name in ("previous_response_id", "prompt_cache_key", "safety_identifier"):
        if not isinstance(request.get(name), (str, type(None))):
            raise invalid(name, request[name], "a text")
    if request.get("truncation") not in (None, "auto", "disabled"):
        raise invalid("truncation", request["truncation"], "auto and disabled")
    if not isinstance(request.get("include"), (list, type(None))):
        raise invalid("include", request["include"], f'a list, like ["{SEALED}"]')
    most = request.get("max_tool_calls")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise invalid("max_tool_calls", most, "integers of 1 or more")
    if request.get("n") not in (None, 1):
        raise invalid("n", request["n"], "1; a response is one answer")
    refuse_hosted(request.get("tools"))
    _check_allowed(request)
    check_formats(request.get("tools"))
    metadata = request.get("metadata")
    if metadata is not None and not _is_metadata(metadata):
        raise invalid("metadata", metadata, f"an object of at most {MAX_METADATA} texts")


def _check_allowed(request: Json) -> None:
    """A `tool_choice` of allowed_tools is this server's to read: it must name tools of the request.

    One of a tool that runs in OpenAI's service, which the model is not offered, is refused.
    """
    choice = request.get("tool_choice")
    if isinstance(choice, dict) and str(cast(Json, choice).get("type")).startswith("web_search"):
        raise unavailable("tool_choice", "this server has no web search")
    if not isinstance(choice, dict) or cast(Json, choice).get("type") != "allowed_tools":
        return
    fields = cast(Json, choice)
    if fields.get("mode") not in ("auto", "required"):
        raise invalid("tool_choice.mode", fields.get("mode"), "auto and required")
    known = [tool_key(tool) for tool in json_objects(request.get("tools"))]
    if not isinstance(fields.get("tools"), list):
        raise invalid("tool_choice.tools", fields.get("tools"), "a list of tools")
    for index, tool in enumerate(cast("list[object]", fields["tools"])):
        if not isinstance(tool, dict) or tool_key(cast(Json, tool)) not in known:
            raise invalid(f"tool_choice.tools[{index}]", cast(object, tool), "type and name of a tool in `tools`")


def wants_sealed(request: Json) -> bool:
    """True if reasoning items have to carry their text for the next turn."""
    return SEALED in (request.get("include") or [])


def reported_fields(request: Json, stored: bool) -> Json:
    """Fields of the response object that deepseek-recipe does not take from the request."""
    fields: Json = {
        "store": stored,
        "previous_response_id": request.get("previous_response_id"),
        "parallel_tool_calls": request.get("parallel_tool_calls") is not False,
        "max_tool_calls": request.get("max_tool_calls"),
        "truncation": request.get("truncation") or "disabled",
        "prompt_cache_key": request.get("prompt_cache_key"),
        "safety_identifier": request.get("safety_identifier"),
        "metadata": request.get("metadata") or {},
    }
    tools, choice = as_functions(request.get("tools"), request.get("tool_choice"))
    if without_refused_strict(tools, request.get("text")) != request.get("tools") or choice != request.get(
        "tool_choice"
    ):
        fields |= {"tools": request.get("tools") or [], "tool_choice": request.get("tool_choice") or "auto"}
    return fields


def _is_metadata(value: object) -> bool:
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else None
    return fields is not None and len(fields) <= MAX_METADATA and all(isinstance(v, str) for v in fields.values())
