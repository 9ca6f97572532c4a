"""Recipes: settings of a run in a TOML file, with dotted overrides; for an unknown key the nearest one is named."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

S = TypeVar("S", bound="Section")
MOST_NEAREST = 3  # unknown keys whose nearest are named: with more, the recipe is of another kind


class RecipeError(ValueError):
    """A recipe, or an override, that cannot be read: an unknown key, a value that is not allowed."""


class Section(BaseModel):
    """A table of a recipe. Subclasses declare its keys; `more_keys` are checked by the subclass itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def more_keys(cls) -> Iterable[str]:
        """Keys that are allowed besides the declared ones."""
        return ()


def read_recipe(schema: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Recipe in the file `path`, None: all defaults, after `overrides` such as "optimizer.rate=1e-3".

    RecipeError names the file or the override, the key and, for an unknown one, the nearest known key.
    """
    place = str(path) if path is not None else "recipe"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RecipeError(f"{path}: no such file; allowed: a recipe in TOML, and KEY=VALUE") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _set(values, override)
    unknown = list(_unknown(schema, values))
    if len(unknown) > MOST_NEAREST:
        raise RecipeError(
            f"{place}: {', '.join(unknown[:MOST_NEAREST])} and {len(unknown) - MOST_NEAREST} more are unknown, as in a "
            f"recipe of another kind; allowed: {', '.join(schema.model_fields)}"
        )
    if unknown:
        words = (f"{key} is unknown; the nearest key is {_nearest(schema, key)}" for key in unknown)
        raise RecipeError(f"{place}: {'; '.join(words)}")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{place}: {'; '.join(_words(error))}") from error


def write_recipe(recipe: Section) -> str:
    """Every setting as TOML that `read_recipe` reads back to an equal recipe; a setting that is None is left out."""
    import tomli_w  # of the extra `train`, which reading does not need

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _set(values: dict[str, Any], override: str) -> None:
    """Set one dotted key; a number in it is the place in a list, at most one behind its last."""
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise RecipeError(f"override {override!r}; allowed: KEY=VALUE with a dotted key, as in optimizer.rate=1e-3")
    path = dotted.split(".")
    last = path[-1]
    where: Any = values
    for key, following in pairwise(path):
        where = _enter(where, key, [] if following.isdecimal() else {}, override)
    _enter(where, last, None, override)
    where[int(last) if isinstance(where, list) else last] = _value(text)


def _enter(where: Any, key: str, new: Any, override: str) -> Any:
    """Table or list at `key` of a table or list, `new` if there is none."""
    if isinstance(where, dict):
        return cast("dict[str, Any]", where).setdefault(key, new) if new is not None else None
    if not isinstance(where, list) or not key.isdecimal() or int(key) > len(where):
        allowed = f"a number up to {len(where)}" if isinstance(where, list) else "nothing below a value"
        raise RecipeError(f"override {override!r}: {key!r}; allowed: {allowed}")
    if int(key) == len(where):
        where.append(new)
    return where[int(key)]


def _value(text: str) -> Any:
    """A value as TOML writes it; any other text is itself."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _section(annotation: Any) -> type[Section] | None:
    """Section that an annotation is, or holds in a tuple."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _unknown(schema: type[Section], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted unknown keys."""
    for key, value in values.items():
        field = schema.model_fields.get(key)
        if field is None:
            if key not in schema.more_keys():
                yield prefix + key
            continue
        inner = _section(field.annotation)
        if inner is not None and isinstance(value, dict):
            yield from _unknown(inner, value, f"{prefix}{key}.")
        elif inner is not None and isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _unknown(inner, item, f"{prefix}{key}.{number}.")


def known_keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """Every dotted key; of lists, those of the first item."""
    yield from (prefix + key for key in schema.more_keys())
    for key, field in schema.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield prefix + key
        else:
            yield from known_keys(inner, f"{prefix}{key}." if inner is field.annotation else f"{prefix}{key}.0.")


def _tables(schema: type[Section]) -> set[str]:
    """Every dotted table above the known keys; of lists, the list and its first item."""
    return {key[:place] for key in known_keys(schema) for place, sign in enumerate(key) if sign == "."}


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line -> (paths, KEY=VALUE). What exists is a path, whatever its name."""
    keys = [word for word in words if "=" in word and not os.path.exists(word)]  # Path's fails for a long value
    return [word for word in words if word not in keys], keys


def changed_keys(section: Section) -> list[str]:
    """Dotted keys whose values are other than their defaults."""
    changed = section.model_dump(exclude_defaults=True)
    return [key for key in known_keys(type(section)) if _has(changed, key.split("."))]


def _has(values: Any, key: Sequence[str]) -> bool:
    """True if nested `values` have the key."""
    return not key or (isinstance(values, Mapping) and key[0] in values and _has(values[key[0]], key[1:]))


def _nearest(schema: type[Section], key: str) -> str:
    """Known key or table that is spelled most like `key`: in the same table if one is close there, else as a whole."""
    known = [*known_keys(schema), *(name for name in _tables(schema) if not key.startswith(f"{name}."))]
    table, _, last = key.rpartition(".")
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == table]
    close = difflib.get_close_matches(last, beside, n=1)
    if close:
        return f"{table}.{close[0]}".lstrip(".")
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _words(error: ValidationError) -> Iterator[str]:
    for one in error.errors():
        key = ".".join(str(part) for part in one["loc"])
        message = one["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(one["input"], dict | Section) else f" is {one['input']!r}"
        yield f"{key}{shown}: {message}" if key else message
