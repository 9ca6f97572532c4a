"""Forms in which an argument of a strict tool may be written: strings as they are, any other value as JSON.

A schema is split by whether its values are strings. Where that is not plain from it (allOf, not, a pattern with
look-around), the whole value is JSON, strings in quotes too: the markup allows that, and the schema still holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from llguidance import LLMatcher

from dsv4.engine.lark import escape

Schema = Mapping[str, Any]

ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment")
)
_DEFINITIONS = ("$defs", "definitions")
_ANYTHING = "(?s:.*)"
_STRINGS = frozenset(("type", "enum", "const", "minLength", "maxLength", "pattern", "format"))
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_DATE = (
    r"[1-9][0-9]{3}-(((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01]))"
    r"|((0[469]|11)-(0[1-9]|[12][0-9]|30))|(02-(0[1-9]|1[0-9]|2[0-8])))"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
# Regexes of formats: all that they match is valid, and nearly all that is valid matches (no leap day, no leap second).
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "email": rf"[a-zA-Z0-9_%+-]+(\.[a-zA-Z0-9_%+-]+)*@({_LABEL}\.)+[a-zA-Z]{{2,63}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
}


@dataclass(frozen=True)
class Text:
    """A string that matches all of these regexes as a whole."""

    regexes: tuple[str, ...]


@dataclass(frozen=True)
class Json:
    """JSON that is valid under the schema."""

    schema: Schema


Form = Text | Json


def argument_forms(schema: object, root: Schema) -> list[Form]:
    """Forms of the values that are valid under `schema`, a part of `root`. ValueError for what is no JSON schema."""
    return [_whole(form, root) if isinstance(form, Json) else form for form in _forms(schema, root, ())]


def resolved(schema: object, root: Schema) -> object:
    """Target of a schema that is a reference into the definitions of `root`; else the schema itself."""
    seen: set[str] = set()
    while isinstance(schema, Mapping) and isinstance(reference := cast(Schema, schema).get("$ref"), str):
        place, _, name = reference.removeprefix("#/").partition("/")
        known = root.get(place)
        if reference in seen or place not in _DEFINITIONS or not isinstance(known, Mapping) or name not in known:
            raise ValueError(f"$ref {reference!r} is not one of its #/$defs/ or refers to itself")
        seen.add(reference)
        schema = cast(Schema, known)[name]
    return cast(object, schema)


def _forms(schema: object, root: Schema, above: tuple[int, ...]) -> list[Form]:
    if schema is True:
        return [Text(()), Json({})]
    if not isinstance(schema, Mapping):
        raise ValueError(f"{schema!r} is no schema; allowed: an object, or true")
    given = cast(Schema, schema)
    keys = given.keys() - ANNOTATIONS
    if keys == {"$ref"}:
        target = resolved(given, root)
        return _forms(target, root, (*above, id(target))) if id(target) not in above else [Json(given)]
    if keys == {"anyOf"} and isinstance(given["anyOf"], list):
        return [form for part in cast("list[object]", given["anyOf"]) for form in _forms(part, root, above)]
    if not keys:
        return [Text(()), Json(given)]
    if "enum" in keys or "const" in keys:
        return _listed(given, keys)
    kind = given.get("type")
    kinds = cast("list[object]", kind) if isinstance(kind, list) else [kind]
    if "string" not in kinds:
        return [Json(given)]
    others = [name for name in kinds if name != "string"]
    strings = keys if not others else keys & _STRINGS  # keywords of other types say nothing about strings
    text = _text(given) if strings <= _STRINGS else None
    if text is None:
        return [Json(given)]
    return [text, Json({**given, "type": others})] if others else [text]


def _listed(schema: Schema, keys: set[str]) -> list[Form]:
    """Forms of a schema with enum or const."""
    values = schema.get("enum", [schema.get("const")])
    text = _text(schema) if keys <= _STRINGS else None
    if text is None or not isinstance(values, list):
        return [Json(schema)]
    kind = schema.get("type", "string")
    listed = [value for value in cast("list[object]", values) if "const" not in schema or value == schema["const"]]
    strings = [
        value for value in listed if isinstance(value, str) and "string" in (kind if isinstance(kind, list) else [kind])
    ]
    strings = [value for value in strings if all(re.fullmatch(regex, value) for regex in text.regexes)]
    rest = [value for value in listed if not isinstance(value, str)]
    forms: list[Form] = [Text(("|".join(map(escape, strings)),))] if strings else []
    if rest and (kind != "string" or "type" not in schema):
        forms.append(Json({**{key: schema[key] for key in schema if key != "const"}, "enum": rest}))
    if not forms:
        raise ValueError(f"none of {values!r} is allowed")
    return forms


def _text(schema: Schema) -> Text | None:
    """The strings that the keywords for strings allow; None where they cannot be written as regexes."""
    regexes: list[str] = []
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    for name, bound in (("minLength", low), ("maxLength", high)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
            raise ValueError(f"{name} is {bound!r}; allowed: 0 or more")
    if low or high is not None:
        regexes.append(f"(?s:.{{{low},{'' if high is None else high}}})")
    if high is not None and high < low:
        raise ValueError(f"minLength {low} is more than maxLength {high}")
    if "pattern" in schema:
        pattern = _searched(schema["pattern"]) if isinstance(schema["pattern"], str) else None
        if pattern is None:
            return None
        regexes.append(pattern)
    if "format" in schema:
        if schema["format"] not in FORMATS:
            return None
        regexes.append(FORMATS[schema["format"]])
    if len(regexes) > 1:
        plain = {name: schema[name] for name in _STRINGS & schema.keys() - {"enum", "const"}} | {"type": "string"}
        error = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(plain))
        if error:
            raise ValueError(error.splitlines()[0])
    return Text(tuple(regexes))


def _searched(pattern: str) -> str | None:
    """Regex of the whole texts in which `pattern` is found; None where it has more than anchors at its ends."""
    found: list[str] = []
    for part in _alternatives(pattern):
        head, tail = _ANYTHING, _ANYTHING
        if part.startswith("^"):
            head, part = "", part[1:]
        slashes = len(part[:-1]) - len(part[:-1].rstrip("\\"))
        if part.endswith("$") and slashes % 2 == 0:
            tail, part = "", part[:-1]
        if any(inner in part for inner in ("(?=", "(?!", "(?<", "\\b", "\\B", "\\A", "\\z", "\\Z")) or _anchored(part):
            return None
        found.append(f"{head}({part}){tail}")
    return "|".join(found)


def _alternatives(pattern: str) -> list[str]:
    """The parts of a regex between the | outside its parentheses and classes."""
    parts = [""]
    depth, in_class, escaped = 0, False, False
    for c in pattern:
        if not escaped and not in_class and depth == 0 and c == "|":
            parts.append("")
            continue
        parts[-1] += c
        if escaped or c == "\\":
            escaped = not escaped
        elif in_class:
            in_class = c != "]"
        else:
            in_class = c == "["
            depth += (c == "(") - (c == ")")
    return parts


def _anchored(part: str) -> bool:
    """True if ^ or $ stand anywhere outside a class."""
    in_class, escaped = False, False
    for c in part:
        if escaped or c == "\\":
            escaped = not escaped
        elif in_class:
            in_class = c != "]"
        elif c in "^$":
            return True
        else:
            in_class = c == "["
    return False


def _whole(form: Json, root: Schema) -> Json:
    """The schema with the definitions that it refers to. ValueError for a reference to anything else."""
    references = _references(form.schema)
    for reference in references:
        if not isinstance(reference, str) or not reference.startswith(("#/$defs/", "#/definitions/")):
            raise ValueError(f"$ref {reference!r}; allowed: #/$defs/...")
    if not references:
        return form
    return Json({**form.schema, **{name: root[name] for name in _DEFINITIONS if name in root}})


def _references(schema: object) -> list[object]:
    """Every $ref in a schema (and in what only looks like one: an example, a property of this name that is a text)."""
    text = json.dumps(schema)
    found: list[object] = []

    def visit(node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in node and not isinstance(node["$ref"], dict):
            found.append(node["$ref"])
        return node

    json.loads(text, object_hook=visit)
    return found
