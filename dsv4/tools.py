"""Tools that an output may call, and which calls it may or must have. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from dsv4.text import check_text

ToolChoice = Literal["auto", "required", "none"] | Mapping[str, Any]
CHOICES = ("auto", "required", "none")
MAX_NAME = 256  # characters of a name in a tag, as many as the parser of answers reads


@dataclass(frozen=True)
class Tool:
    """A tool, with the JSON schema of its parameters.

    strict: arguments are valid under the schema. Otherwise tool and parameters have known names, and values any form
    that can be read. `input_grammar`: Lark grammar of the only argument, `input`, a text.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    input_grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not is_name(self.name):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"tool name {self.name!r}; allowed: 1 to {MAX_NAME} characters, no quotes, <, > or control"
            )
        if not isinstance(self.parameters, (Mapping, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"tool {self.name!r} has parameters {self.parameters!r}; allowed: a JSON schema (dict)")
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"tool {self.name!r} has parameters that are no JSON: {error}") from error
        if not isinstance(self.input_grammar, (str, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"tool {self.name!r} has input_grammar {self.input_grammar!r}; allowed: the text of a grammar"
            )
        if not isinstance(self.strict, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"tool {self.name!r} has strict {self.strict!r}; allowed: True or False")

    @classmethod
    def of(cls, given: Tool | Mapping[str, Any]) -> Tool:
        """A tool given as such, as a dict of its fields, or in OpenAI's form, {"type": "function", "function": ...}."""
        if isinstance(given, Tool):
            return given
        if not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"tool {given!r}; allowed: a Tool, or a dict with name, parameters and strict")
        fields = cast("Mapping[str, Any]", given.get("function", given))
        strict, grammar = bool(fields.get("strict")), fields.get("input_grammar")
        return cls(fields.get("name", ""), fields.get("parameters"), strict, grammar)


def is_name(name: str) -> bool:
    """True if a name can stand in a tag: nothing in it ends the attribute, has to be escaped or begins a mark."""
    return 0 < len(name) <= MAX_NAME and name.isprintable() and not any(c in '"<>\\｜' for c in name)


def check_tools(tools: Sequence[Tool | Mapping[str, Any]], choice: ToolChoice) -> tuple[Tool, ...]:
    """The tools that may be called. ValueError names what is not allowed."""
    if isinstance(tools, (str, Mapping)):
        raise ValueError(f"SamplingParams.tools is {tools!r}; allowed: a list of tools")
    found: dict[str, Tool] = {}
    for place, given in enumerate(tools):
        try:
            tool = Tool.of(given)
            check_text(tool.name, "its name")
        except ValueError as error:
            raise ValueError(f"SamplingParams.tools[{place}]: {error}") from error
        if tool.name in found:
            raise ValueError(f"SamplingParams.tools[{place}] is a second {tool.name!r}; names must differ")
        found[tool.name] = tool
    if isinstance(choice, Mapping):
        fields = cast("Mapping[str, Any]", choice.get("function", choice))
        name = fields.get("name")
        if name not in found:
            raise ValueError(f"SamplingParams.tool_choice names {name!r}; allowed: {', '.join(found) or 'no tool'}")
        return (found[cast(str, name)],)
    if choice not in CHOICES:
        raise ValueError(f'SamplingParams.tool_choice is {choice!r}; allowed: {", ".join(CHOICES)}, {{"name": ...}}')
    if choice == "required" and not found:
        raise ValueError("SamplingParams.tool_choice is 'required', but there are no tools")
    return () if choice == "none" else tuple(found.values())
