"""Grammar of an output that may or must call tools, in the markup that V4 is trained on.

    optional  text, or text and a block of calls
    required  a block of calls
    none      text

Text has no tags of the markup, spelled out in characters neither, so that a block cannot begin where none may be. With
a schema the text is JSON and a block takes its place. A strict tool's arguments come in the order of its properties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from dsv4.engine.argument_forms import ANNOTATIONS, Form, Text, argument_forms, resolved
from dsv4.engine.call_markup import CallMarkup
from dsv4.engine.lark import ALL_TOKENIZATIONS, escape, json_rule, nested_lark, quoted, regex_terminal
from dsv4.tokenizer.special import DSML
from dsv4.tools import Tool, is_name

_TOP = ANNOTATIONS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
}
_FREE_NAME = "[a-zA-Z0-9_.$@/:-]{1,64}"


class Name(str):
    """Name of a rule or terminal, beside literal text."""


class ToolGrammar:
    """Writes the grammar of one output.

    `mark_id`: the token that every tag has; None where the tokenizer has none, and tags are text. `text`: schema of the
    text beside calls; None for any text.
    """

    def __init__(self, tools: Sequence[Tool], mark_id: int | None, text: Mapping[str, Any] | None = None) -> None:
        self._tools, self._mark_id = tools, mark_id
        self._markup = CallMarkup.of()
        self._rules: dict[str, str] = {}
        tag = regex_terminal(f"(?s:.*)</?{DSML}(?s:.*)")
        self._rules["TEXT"] = f"{regex_terminal('(?s:.*)')} & ~{tag}"
        self._json = text is not None
        if text is not None:
            self._rules["said"] = json_rule(text)

    def lark(self, required: bool = False, parallel: bool = True, begun: bool = False) -> str:
        """The grammar. `begun`: the prompt has written the block's first tag. ValueError names the tool at fault."""
        said = "said" if self._json else "TEXT"
        if not self._tools:
            self._rules["start"] = said
        else:
            self._add_calls(parallel)
            block = self._sequence(self._markup.before + self._markup.begin, Name("calls"))
            if begun:
                block = "calls"
            elif not required and self._json:
                block = f"said | {block}"
            elif not required:
                before, rest = self._up_to_mark("TEXT", "BEFORE", self._markup.begin)
                block = f"TEXT | {self._sequence(before, rest, Name('calls'))}"
            self._rules["start"] = block
        return "\n".join(f"{name}: {rule}" for name, rule in self._rules.items()) + ALL_TOKENIZATIONS

    def _add_calls(self, parallel: bool) -> None:
        names = [self._add_call(place, tool) for place, tool in enumerate(self._tools)]
        self._rules["call"] = " | ".join(names)
        self._rules["calls"] = self._sequence(Name("call+" if parallel else "call"), self._markup.end)

    def _add_call(self, place: int, tool: Tool) -> str:
        try:
            if tool.input_grammar is not None:
                arguments = self._input(place, tool.input_grammar)
            else:
                arguments = self._strict(place, tool) if tool.strict else self._free(place, tool)
        except ValueError as error:
            raise ValueError(f"tool {tool.name!r}: {error}") from error
        begin, begun = self._markup.tool
        name = f"call_{place}"
        self._rules[name] = self._sequence(begin + tool.name + begun, *arguments, self._markup.call_end)
        return name

    def _input(self, place: int, grammar: str) -> list[str]:
        """One argument, whose text follows a grammar of its own."""
        begin, begun, end = self._markup.text
        self._rules[f"input_{place}"] = nested_lark(grammar)
        return [f"{begin}input{begun}", Name(f"input_{place}"), end]

    def _strict(self, place: int, tool: Tool) -> list[str]:
        """Arguments of which each is valid, in the order of the properties, those that are required present."""
        root = tool.parameters or {}
        schema = resolved(root, root)
        if not isinstance(schema, Mapping):
            raise ValueError(f"its parameters are {schema!r}; allowed: the schema of an object")
        properties, required = _members(cast("Mapping[str, Any]", schema))
        arguments: list[str] = []
        for number, (name, value) in enumerate(properties.items()):
            if value is False and name not in required:
                continue
            if not is_name(name):
                raise ValueError(f"its parameter {name!r} cannot be written in a tag")
            rule = f"argument_{place}_{number}"
            try:
                forms = argument_forms(value, root)
                self._rules[rule] = " | ".join(
                    self._argument(name, form, f"{place}_{number}_{i}") for i, form in enumerate(forms)
                )
            except ValueError as error:
                raise ValueError(f"its parameter {name!r}: {error}") from error
            arguments.append(Name(rule if name in required else f"{rule}?"))
        return arguments

    def _free(self, place: int, tool: Tool) -> list[str]:
        """Any arguments of known names; of any name where the schema does not list them."""
        schema = tool.parameters or {}
        properties: object = schema.get("properties")
        known = cast("Mapping[str, Any]", properties if isinstance(properties, Mapping) else {})
        names = [escape(name) for name in known if is_name(name)]
        extra = schema.get("additionalProperties", not known or bool(schema.keys() - _TOP))
        if extra is not False:
            names.append(_FREE_NAME)
        if not names:
            return []
        terminal, rule = f"NAME_{place}", f"argument_{place}"
        self._rules[terminal] = regex_terminal("|".join(names))
        self._rules.setdefault("any", json_rule({}))
        text, other = self._markup.text, self._markup.other
        string = self._sequence(text[0], Name(terminal), text[1], *self._up_to_mark("TEXT", "STRING", text[2]))
        self._rules[rule] = f"{string} | {self._sequence(other[0], Name(terminal), other[1], Name('any'), other[2])}"
        return [Name(f"{rule}*")]

    def _argument(self, name: str, form: Form, number: str) -> str:
        if isinstance(form, Text):
            begin, begun, end = self._markup.text
            string, closed = "TEXT", "STRING"
            if form.regexes:
                string, closed = f"TEXT_{number}", f"STRING_{number}"
                self._rules[string] = " & ".join(["TEXT", *map(regex_terminal, form.regexes)])
            return self._sequence(begin + name + begun, *self._up_to_mark(string, closed, end))
        begin, begun, end = self._markup.other
        self._rules[f"json_{number}"] = json_rule(form.schema)
        return self._sequence(begin + name + begun, Name(f"json_{number}"), end)

    def _up_to_mark(self, text: str, terminal: str, tag: str) -> tuple[Name, str]:
        """A terminal of the text and the tag after it, as far as both are characters; the rest of the tag."""
        head, mark, _ = tag.partition(DSML)
        written = head if self._mark_id is not None else head + mark
        self._rules[terminal] = f"{text} {quoted(written)}"
        return Name(terminal), tag.removeprefix(written)

    def _sequence(self, *parts: str) -> str:
        """One after the other: names, and literal text in which each mark becomes its token."""
        items: list[str] = []
        literal = ""
        for part in (*parts, Name("")):
            if not isinstance(part, Name):
                literal += part
                continue
            pieces = literal.split(DSML) if self._mark_id is not None else [literal]
            for place, piece in enumerate(pieces):
                items += [f"<[{self._mark_id}]>"] * (place > 0) + [quoted(piece)] * bool(piece)
            items += [str(part)] * bool(part)
            literal = ""
        return " ".join(items)


def _members(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], set[str]]:
    """(properties, names of those that are required) of a strict tool's parameters."""
    kind = schema.get("type", "object")
    if kind != "object":
        raise ValueError(f"its parameters have the type {kind!r}; allowed: object")
    unknown = sorted(schema.keys() - _TOP)
    if unknown:
        raise ValueError(f"its parameters have {unknown[0]!r}, which no strict tool may have beside its properties")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise ValueError(f"its properties are {properties!r}; allowed: an object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in cast("list[object]", required)):
        raise ValueError(f"its required is {required!r}; allowed: a list of names")
    missing = [name for name in cast("list[str]", required) if name not in properties or properties[name] is False]
    if missing:
        raise ValueError(f"it requires {missing[0]!r}, which is not among its properties")
    return cast("Mapping[str, Any]", properties), set(cast("list[str]", required))
