"""Request JSON of unvalidated shape."""

from __future__ import annotations

from typing import Any, cast

Json = dict[str, Any]


def json_objects(value: object) -> list[Json]:
    """JSON objects in an array; an empty list for any other value."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast(Json, item) for item in items if isinstance(item, dict)]


def are_integers(value: object) -> bool:
    """True for an array of integers alone, an empty one too; as fast and small for a million as a search can be."""
    return isinstance(value, list) and {*map(type, cast("list[object]", value))} <= {int}
