"""Lone surrogates: halves of surrogate pairs, which JSON can escape but which are no valid text."""

from __future__ import annotations

from typing import cast

from dsv4.server.unchecked_json import Json


def unreadable_text(value: object, place: str = "") -> str | None:
    """Place of the first string or field name that holds a lone surrogate; None if there is none."""
    pending: list[tuple[object, str]] = [(value, place)]
    while pending:
        value, place = pending.pop()
        if isinstance(value, str):
            if not _is_text(value):
                return place
        elif isinstance(value, list):
            items = cast("list[object]", value)
            pending += [(item, f"{place}[{index}]") for index, item in reversed(list(enumerate(items)))]
        elif isinstance(value, dict):
            fields = cast(Json, value)
            if any(not _is_text(name) for name in fields):
                return f"{place or 'the body'} (the name of a field)"
            prefix = f"{place}." if place else ""
            pending += [(field, prefix + name) for name, field in reversed(fields.items())]
    return None


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
