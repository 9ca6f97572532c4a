"""JSON of requests whose shape nobody has checked yet."""

from __future__ import annotations

from typing import Any, cast

Json = dict[str, Any]


def json_objects(value: object) -> list[Json]:
    """The JSON objects of an array; an empty list for anything else."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast(Json, item) for item in items if isinstance(item, dict)]
