"""Checks of an answer's text against a known answer: the same text, or the same mathematics by math-verify."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

Check = Literal["exact", "math"]
CHECKS: tuple[Check, ...] = get_args(Check)
LONGEST = 1000  # characters of an expression; math-verify gives a longer one up some seconds later
_BOXED = "\\boxed{"


def check_answer(check: Check, wanted: str, answer: str) -> float:
    """1.0 for a right answer, else 0.0. `exact`: the same text but for space around it; `math`: as of `same_value`."""
    if check == "exact":
        return float(answer.strip() == wanted.strip())
    return float(same_value(wanted, answer))


def check_available(check: Check) -> None:
    """ValueError if a check lacks what it needs."""
    if check == "math" and find_spec("math_verify") is None:
        raise ValueError("check is math, which needs math-verify (pip install math-verify); without it: exact")


def same_value(wanted: str, answer: str) -> bool:
    """True if math-verify finds the end of an answer equal to `wanted`.

    The end is the last \\boxed{...}, else the last line; one of more than LONGEST characters is wrong. Where a number
    is wanted it has to hold one number, with nothing to compute: an expression equals the answer of its own question.
    """
    from dsv4.post_training.domains.mathematics import NUMBER, same_number  # needs the tasks' package

    end = answer_end(answer)
    if NUMBER.fullmatch(wanted.strip()):
        return same_number(wanted, end)
    if len(end) > LONGEST:
        return False
    library: Any = import_module("math_verify")
    return bool(library.verify(_parsed(library, wanted), _parsed(library, end)))


def answer_end(text: str) -> str:
    """What the last \\boxed{...} of a text holds, else its last line that is not empty."""
    start = text.rfind(_BOXED)
    depth = 0
    for place in range(start + len(_BOXED) - 1, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(_BOXED) : place].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _parsed(library: Any, text: str) -> Any:
    """What math-verify reads in a text, as LaTeX if it marks none itself."""
    return library.parse(text if "$" in text else f"${text}$")
