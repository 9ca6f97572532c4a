"""Bodies that pydantic models check: refusals that name the field, worded as in the other formats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError

from dsv4.server.errors import RequestError
from dsv4.server.surrogates import unreadable_text
from dsv4.server.unchecked_json import Json
from dsv4.server.wishes import invalid

M = TypeVar("M", bound=BaseModel)

_HEAD = "Failed to deserialize the JSON body into the target type"
_ENCODER, _SHOWN = json.JSONEncoder(), 80  # characters of a wrong value
_RANGE_FAULTS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number")


def read_json_object(body: bytes) -> Json:
    """A body as a JSON object. RequestError 400 for anything else, and for text that is none."""
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        request: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"{_HEAD}: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(400, f"{_HEAD}: {type(request).__name__} is no object")
    place = unreadable_text(text, cast(Json, request))
    if place is not None:
        raise RequestError(400, f"{_HEAD}: {place} holds bytes or escapes that are no text", param=place)
    return cast(Json, request)


def validated(model: type[M], request: Json, ranges: Mapping[str, str] | None = None) -> M:
    """A request as an instance of the model. RequestError 400 names the first fault.

    pydantic notes every fault in a list or an object, with which one body could take gigabytes: the elements of such
    fields are checked elsewhere (SkipValidation).

    `ranges`: ranges of fields in the hosted service's words.
    """
    try:
        return model.model_validate(request)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
    name, kind = str(fault["loc"][0]), fault["type"]
    allowed = fault["msg"].removeprefix("Input should be ")
    if kind == "missing":
        raise _type_fault(f"missing field `{name}`", name)
    if kind in _RANGE_FAULTS:
        worded = (ranges or {}).get(name)
        raise invalid(name, request[name], allowed) if worded is None else out_of_range(name, worded)
    raise wrong_type(name, request.get(name), allowed)


def wrong_type(name: str, value: object, allowed: str) -> RequestError:
    shown = "".join(itertools.islice(_ENCODER.iterencode(value), _SHOWN))  # no more of a long list than is shown
    return _type_fault(f"{name}: {shown[:_SHOWN]}; allowed: {allowed}", name)


def out_of_range(name: str, allowed: str) -> RequestError:
    return RequestError(400, f"Invalid {name} value, the valid range of {name} is {allowed}", param=name)


def _type_fault(message: str, name: str) -> RequestError:
    return RequestError(400, f"{_HEAD}: {message}", param=name)
