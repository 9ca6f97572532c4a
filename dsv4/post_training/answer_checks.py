"""Checks of an answer's text: a known answer's text, its mathematics by math-verify, or a JSON schema."""

from __future__ import annotations

import json
import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

from dsv4.conversation.tool_arguments import finite

Check = Literal["exact", "math", "schema"]
CHECKS: tuple[Check, ...] = get_args(Check)
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")  # keywords of a JSON schema
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
    """JSON text of a schema, given as an object or as its text. ValueError if it is none, or refers beyond itself."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = read_json(text)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        if not isinstance(found.get("$schema", ""), str):
            raise ValueError(f"$schema is {found['$schema']!r}; allowed: a text")
        validator: Any = validator_for(found, Draft202012Validator)
        validator.check_schema(found)
        _check_references(found, validator)
    except (ValueError, TypeError, ArithmeticError, RecursionError, SchemaError) as error:
        words = error.message if isinstance(error, SchemaError) else str(error)
        raise ValueError(f"answer is no JSON schema, which check schema needs: {words}") from None
    return json.dumps(found)


def _check_references(schema: dict[str, Any], validator: Any) -> None:
    """ValueError or SchemaError at a reference of a schema that leads nowhere, out of it, or to what is no schema."""
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    dialect = validator.META_SCHEMA["$schema"]
    specification, alone = specification_with(dialect), "/draft-0" in dialect  # there nothing beside $ref counts
    root = specification.create_resource(schema)
    pending: list[tuple[Any, Any]] = [(schema, REGISTRY.resolver_with_root(root))]
    seen, checked = set[int](), {id(schema)}
    while pending:
        contents, resolver = pending.pop()
        if not isinstance(contents, dict) or id(contents) in seen:
            continue
        seen.add(id(contents))
        for keyword in REFERENCES:
            reference = cast("dict[str, Any]", contents).get(keyword)
            if not isinstance(reference, str):
                continue
            try:
                target = resolver.lookup(reference)
            except (Unresolvable, LookupError, TypeError, ValueError, AttributeError):
                raise ValueError(f"{keyword} is {reference!r}, which is not in it") from None
            if id(target.contents) not in checked:
                checked.add(id(target.contents))
                own = validator_for(target.contents, validator) if isinstance(target.contents, dict) else validator
                own.check_schema(target.contents)
            pending.append((target.contents, target.resolver))
        if alone and "$ref" in contents:
            continue
        for part in specification.create_resource(contents).subresources():
            pending.append((part.contents, resolver.in_subresource(part)))


def read_json(text: str) -> Any:
    """Value of a JSON text. ValueError for another text, as one with NaN or a number beyond those of 64 bits."""
    return json.loads(text, parse_constant=finite, parse_float=finite)


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
        return validator(schema, registry=Registry()).is_valid(read_json(text))
    except Unresolvable as error:
        raise ValueError(f"the schema refers to {error.ref!r}, which is not in it") from None
    except (ValueError, ArithmeticError, RecursionError):  # such as a number that is too large to divide
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
