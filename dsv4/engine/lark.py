"""Pieces of grammars in llguidance's variant of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from llguidance import regex_to_lark

# By default llguidance makes the parts of a text that have no alternative take its own tokenization.
ALL_TOKENIZATIONS = '\n%llguidance {"no_forcing": true}\n'

# Between the parts of JSON. Where line breaks and runs of spaces are allowed, weak models write them for ever.
_WHITESPACE = " ?"


def json_rule(schema: Mapping[str, Any]) -> str:
    """Rule of the JSON texts that are valid under a schema; nothing unsupported in it is passed over."""
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        raise ValueError(f"the schema has x-guidance {own!r}; allowed: an object")
    options: dict[str, Any] = {} if "whitespace_flexible" in own else {"whitespace_pattern": _WHITESPACE}
    options |= {**cast("dict[str, Any]", own), "lenient": False}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def regex_terminal(regex: str) -> str:
    """Terminal of the texts that match a regex, in the syntax of Rust's regex crate, as a whole."""
    return f"/{regex_to_lark(regex, '')}/"


def escape(text: str) -> str:
    """A regex of one text."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def quoted(text: str) -> str:
    """A text as a literal."""
    return json.dumps(text, ensure_ascii=False)
