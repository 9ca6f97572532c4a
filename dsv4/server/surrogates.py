"""Lone surrogates: halves of surrogate pairs, which JSON can escape but which are no valid text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import cast

from dsv4.server.unchecked_json import Json

_LONE = re.compile(r"[\ud800-\udfff]")  # in a text that was read: pairs are characters by then
# Without one of these a body has no lone surrogate: most bodies are searched, and not walked.
_MAYBE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def unreadable_text(text: str, request: Json) -> str | None:
    """Place of the first string or field name of a request that holds a lone surrogate; None if there is none.

    `text`: the JSON that was read. A large body takes no memory beside it: only the way to a value is kept.
    """
    if _MAYBE.search(text) is None:
        return None
    way: list[int | str] = []
    levels: list[Iterator[tuple[int | str, object]]] = [iter(request.items())]
    while levels:
        name, value = next(levels[-1], (None, None))
        if name is None:
            levels.pop()
            del way[-1:]
        elif isinstance(name, str) and not _is_text(name):
            return f"{_written(way) or 'the body'} (the name of a field)"
        elif isinstance(value, str):
            if not _is_text(value):
                return _written([*way, name])
        elif isinstance(value, (list, dict)):
            way.append(name)
            levels.append(_parts(cast("Json | list[object]", value)))
    return None


def _parts(value: Json | list[object]) -> Iterator[tuple[int | str, object]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


def _written(way: Sequence[int | str]) -> str:
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in way).removeprefix(".")


def _is_text(value: str) -> bool:
    return value.isascii() or _LONE.search(value) is None
