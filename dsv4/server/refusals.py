"""Refusals in the words of deepseek-recipe, with the place of the fault beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

import deepseek_recipe as recipe

from dsv4.server.errors import RequestError
from dsv4.server.locate import Judge, locate, named_place
from dsv4.server.surrogates import unreadable_text
from dsv4.server.unchecked_json import Json

_NO_FORCED_TOOL = "Thinking mode does not support this tool_choice"
_THINKING_OFF = '. Turn thinking off for this request with "thinking": {"type": "disabled"}, or leave tool_choice at '


def describe(
    error: recipe.ConversionError | ValueError,
    body: bytes,
    parse: Callable[[bytes], object],
    convert: Callable[[bytes], object],
    auto: str,
) -> RequestError:
    """The refusal of `body` for which deepseek-recipe raised `error`.

    `parse` and `convert` raise what deepseek-recipe raises when it reads and when it converts a body; `auto`: how the
    protocol writes the tool choice that leaves the model free.
    """
    refused = RequestError.from_recipe(error)
    if refused.message == _NO_FORCED_TOOL:
        return RequestError(refused.status, _NO_FORCED_TOOL + _THINKING_OFF + auto, param="tool_choice")
    request = _readable(body)
    if request is None:
        return refused
    place = unreadable_text(request)
    if place is not None:
        return RequestError(400, f"{refused.message}: {place} holds bytes or escapes that are no text", param=place)
    if is_bad_json(error):
        return refused  # it names line and column
    deep = not isinstance(error, recipe.ConversionError)
    named = None if deep else named_place(refused.message, request)
    if named is not None:
        return RequestError(refused.status, refused.message, param=named)
    try:
        place = locate(request, str(error), _judge(parse if deep else convert), deep=deep)
    except RecursionError:  # a request so deep that it cannot be written again
        return refused
    return refused if place is None else _placed(refused, place, deep)


def is_bad_json(error: Exception) -> bool:
    """True if deepseek-recipe could not read a body as JSON, and so named the line and column."""
    return str(error).startswith("invalid JSON request")


def _readable(body: bytes) -> Json | None:
    """The body as JSON, its invalid bytes as lone surrogates; None for what is no JSON object."""
    try:
        request: object = json.loads(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return cast(Json, request) if isinstance(request, dict) else None


def _judge(check: Callable[[bytes], object]) -> Judge:
    def judge(request: str) -> str | None:
        try:
            check(request.encode())
        except (recipe.ConversionError, ValueError) as error:
            return str(error)
        except RequestError as error:
            return error.message
        return None

    return judge


def _placed(refused: RequestError, place: str, deep: bool) -> RequestError:
    """The place stands before what a parser says, as the hosted service has it, and after a sentence for people."""
    head, colon, detail = refused.message.partition(": ")
    if deep and colon:
        return RequestError(refused.status, f"{head}: {place}: {detail}", param=place)
    shown = f"{refused.message} ({place})" if "[" in place else refused.message
    return RequestError(refused.status, shown, param=place)
