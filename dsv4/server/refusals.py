"""Refusals: deepseek-recipe's messages, with the place of the fault added."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

import deepseek_recipe as recipe

from dsv4.server.errors import RequestError
from dsv4.server.locate import Judge, locate, named_place
from dsv4.server.surrogates import unreadable_text
from dsv4.server.unchecked_json import Json


def describe(
    error: recipe.ConversionError | ValueError,
    body: bytes,
    parse: Callable[[bytes], object],
    convert: Callable[[bytes], object],
) -> RequestError:
    """RequestError for the `error` that deepseek-recipe raised for `body`.

    `parse` and `convert` parse and convert a body with deepseek-recipe and raise its errors.
    """
    refused = RequestError.from_recipe(error)
    text, request = _readable(body)
    if request is None:
        return refused
    place = unreadable_text(text, request)
    if place is not None:
        return RequestError(400, f"{refused.message}: {place} holds bytes or escapes that are no text", param=place)
    if is_bad_json(error):
        return refused  # the message names line and column
    deep = not isinstance(error, recipe.ConversionError)
    named = None if deep else named_place(refused.message, request)
    if named is not None:
        return RequestError(refused.status, refused.message, param=named)
    try:
        place = locate(request, str(error), _judge(parse if deep else convert), deep=deep)
    except RecursionError:  # the request is nested too deeply to be serialized
        return refused
    return refused if place is None else _placed(refused, place, deep)


def is_bad_json(error: Exception) -> bool:
    """True if deepseek-recipe could not parse a body as JSON; the error then names line and column."""
    return str(error).startswith("invalid JSON request")


def _readable(body: bytes) -> tuple[str, Json | None]:
    """The body as text, with invalid bytes as lone surrogates, and as JSON; None for the latter if it is no object."""
    text = body.decode("utf-8", "surrogateescape")
    try:
        request: object = json.loads(text)
    except (ValueError, RecursionError):
        return text, None
    return text, cast(Json, request) if isinstance(request, dict) else None


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
    """Adds the place: before the detail of a parser's message, as the hosted service does, else in parentheses."""
    head, colon, detail = refused.message.partition(": ")
    if deep and colon:
        return RequestError(refused.status, f"{head}: {place}: {detail}", param=place)
    shown = f"{refused.message} ({place})" if "[" in place else refused.message
    return RequestError(refused.status, shown, param=place)
