"""Request JSON of unvalidated shape."""

from __future__ import annotations

from typing import Any, cast

Json = dict[str, Any]


def json_objects(value: object) -> list[Json]:
    """JSON objects in an array; an empty list for any other value."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast(Json, item) for item in items if isinstance(item, dict)]
