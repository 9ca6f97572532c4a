"""Checks of an answer's text: a known answer's text, its mathematics by math-verify, or a JSON schema."""

from __future__ import annotations

import json
import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

Check = Literal["exact", "math", "schema"]
CHECKS: tuple[Check, ...] = get_args(Check)
LONGEST = 1000  # characters of an expression; math-verify gives a longer one up some seconds later
_BOXED = "\\boxed{"
_FENCED = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)```\s*", re.DOTALL)


def check_answer(check: Check, wanted: str, answer: str) -> float:
    """1.0 for a right answer, else 0.0. `exact`: the same text but for space around it; `math`: as of `same_value`;
    `schema`: as of `fits_schema`."""
    if check == "exact":
        return float(answer.strip() == wanted.strip())
    if check == "schema":
        return float(fits_schema(wanted, answer))
    return float(same_value(wanted, answer))


def check_available(check: Check) -> None:
    """ValueError if a check lacks what it needs."""
    if check == "math" and find_spec("math_verify") is None:
        raise ValueError("check is math, which needs math-verify (pip install math-verify); without it: exact")


def check_schema(schema: Any) -> str:
    """JSON text of a schema, given as an object or as its text. ValueError if it is none."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        validator_for(found, Draft202012Validator).check_schema(found)
    except (ValueError, RecursionError, SchemaError) as error:
        words = error.message if isinstance(error, SchemaError) else str(error)
        raise ValueError(f"answer is no JSON schema, which check schema needs: {words}") from None
    return json.dumps(found)


def fits_schema(schema: str, answer: str) -> bool:
    """True if an answer is a JSON value that fulfils a schema, alone or in one fenced block."""
    fenced = _FENCED.fullmatch(answer)
    return fulfils(fenced[1] if fenced else answer, json.loads(schema))


def fulfils(text: str, schema: dict[str, Any]) -> bool:
    """True if a text is a JSON value that fulfils a schema; ValueError for one that refers to other documents."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validator: Any = validator_for(schema, Draft202012Validator)
    try:
        return validator(schema, registry=Registry()).is_valid(json.loads(text))
    except Unresolvable as error:
        raise ValueError(f"the schema refers to {error.ref!r}, which is not in it") from None
    except (ValueError, RecursionError):
        return False


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
    """Content of the last \\boxed{...} of a text, else its last line that is not empty."""
    start = text.rfind(_BOXED)
    depth = 0
    for place in range(start + len(_BOXED) - 1, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(_BOXED) : place].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _parsed(library: Any, text: str) -> Any:
    """Expressions that math-verify reads in a text, as LaTeX if it marks none itself."""
    return library.parse(text if "$" in text else f"${text}$")
