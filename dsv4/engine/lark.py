"""Pieces of grammars in llguidance's variant of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from llguidance import LLMatcher, regex_to_lark

# By default llguidance makes the parts of a text that have no alternative take its own tokenization.
ALL_TOKENIZATIONS = '\n%llguidance {"no_forcing": true}\n'

# Strings, regexes and comments of a Lark text; what is left has "<" only where it names tokens.
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/(?:\\.|[^/\\])*/|#[^\n]*')

_EXCERPT = re.compile(r" *(\d+ \||\^+$)")  # a line of the grammar, and the mark below it, in an error
_DIRECTIVES = ("%import", "%ignore")
MAX_RULES = 1000  # of one grammar: llguidance follows a chain of them on the stack

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


def nested_lark(grammar: str) -> str:
    """Rule of the texts of a whole grammar. ValueError as of `check_lark`."""
    check_lark(grammar)
    return f"%lark {{\n{grammar}\n}}"


def check_lark(grammar: str) -> None:
    """ValueError for what is no grammar of text, names what it must not, or is too large to be read."""
    plain = check_names_no_token(grammar)
    for directive in re.findall(r"%\w*", plain):
        if directive not in _DIRECTIVES:
            raise ValueError(f"the grammar has {directive}; allowed: {', '.join(_DIRECTIVES)}")
    num_rules = plain.count(":")
    if num_rules > MAX_RULES:
        raise ValueError(f"the grammar has {num_rules} rules; allowed: {MAX_RULES}")
    error = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar))
    if error:
        raise ValueError(f"the grammar is wrong: {reason_of(error)}")


def check_names_no_token(grammar: str) -> str:
    """The grammar without literals. ValueError if it names tokens, which would let it write what ends a turn."""
    plain = _LITERALS.sub("", grammar)
    if "<" in plain:
        raise ValueError("the grammar names tokens with <...>; allowed: strings and regexes of text")
    return plain


def regex_terminal(regex: str) -> str:
    """Terminal of the texts that match a regex, in the syntax of Rust's regex crate, as a whole."""
    return f"/{regex_to_lark(regex, '')}/"


def escape(text: str) -> str:
    """A regex of one text."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def quoted(text: str) -> str:
    """A text as a literal."""
    return json.dumps(text, ensure_ascii=False)


def reason_of(message: str) -> str:
    """An error of llguidance on one line, without the excerpt and the parser's state, 500 characters at most."""
    lines = message.split("<state>")[0].splitlines()
    return " ".join(" ".join(line for line in lines if not _EXCERPT.match(line)).split())[:500]
