"""Efforts as recipes and commands name them: levels, V4.1's budgets, ranges of these, and `none`, without thinking."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal, cast

from pydantic import AfterValidator

from dsv4.data.tasks.base import Effort
from dsv4.tokenizer.effort_number import MAX_BUDGET, MIN_BUDGET

EFFORTS: tuple[Effort, ...] = ("low", "high", "max")
Asked = Effort | int  # a level, or a budget
NON_THINK: Literal["none"] = "none"
Mode = Asked | Literal["none"]  # or the mode that does not think
_BUDGETS = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?")


def read_effort(name: str | int, allowed: Iterable[str] = EFFORTS) -> str | int:
    """A level, a budget, or a range of budgets as `1-100`. ValueError, with the names `allowed`, for anything else."""
    if name in EFFORTS:
        return name
    found = _BUDGETS.fullmatch(str(name))
    if found is not None:
        first, last = int(found[1]), int(found[2] or found[1])
        if MIN_BUDGET <= first <= last <= MAX_BUDGET:
            return first if found[2] is None else str(name)
    raise ValueError(
        f"effort is {name!r}; allowed: {', '.join(allowed)}, a budget of {MIN_BUDGET} to {MAX_BUDGET}, or a range of "
        f"budgets such as {MIN_BUDGET}-{MAX_BUDGET}"
    )


def read_mode(name: str | int) -> str | int:
    """As `read_effort`, or `none`. ValueError for anything else."""
    return name if name == NON_THINK else read_effort(name, (NON_THINK, *EFFORTS))


EffortName = Annotated[str | int, AfterValidator(read_effort)]
ModeName = Annotated[str | int, AfterValidator(read_mode)]


def asked_efforts(names: Iterable[str | int]) -> tuple[Asked, ...]:
    """The levels and budgets of names, each once, ranges written out."""
    found: dict[Asked, None] = {}
    for name in map(read_effort, names):
        if isinstance(name, int) or name in EFFORTS:
            found[cast(Asked, name)] = None
        else:
            first, _, last = name.partition("-")
            found |= dict.fromkeys(range(int(first), int(last) + 1))
    return tuple(found)


def asked_modes(names: Iterable[str | int]) -> tuple[Mode, ...]:
    """As `asked_efforts`, of names of which `none` may be one; it then comes first."""
    names = tuple(names)
    first: tuple[Mode, ...] = (NON_THINK,) if NON_THINK in names else ()
    return first + asked_efforts(name for name in names if name != NON_THINK)


def has_budgets(names: Iterable[str | int]) -> bool:
    """True if one of the names is a budget, or a range of them."""
    return any(name not in (NON_THINK, *EFFORTS) for name in names)
