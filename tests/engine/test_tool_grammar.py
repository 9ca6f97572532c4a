"""Calls under the tool grammar: valid ones can be written, and all that can be written parses to valid ones."""

from __future__ import annotations

import json
import random
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from tool_calls import NOTE, WEATHER, Calls, parse, render, strict_tools, tokens

from dsv4.engine import LLM, SamplingParams
from dsv4.engine.argument_forms import FORMATS
from dsv4.engine.call_markup import CallMarkup
from dsv4.engine.constraint import Constraint, allows
from dsv4.engine.grammar import GrammarCompiler, GrammarError
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import DSML

NANO = Path(__file__).parents[2] / "models" / "nano"
TOKENIZER = Tokenizer.from_pretrained(NANO)
EOS = TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, [EOS])
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
HOT = {"city": "Paris", "unit": "°C"}


def compiled(*tools: dict[str, Any], **fields: Any) -> Constraint:
    return COMPILER.compile(SamplingParams(tools=tools, **fields))


def accepts(constraint: Constraint, ids: list[int]) -> bool:
    """True if the tokens may be written, and the output may end after them."""
    for token in ids:
        if constraint.complete or not allows(constraint.masks()[0], token):
            return False
        constraint.advance(token)
    return constraint.complete or allows(constraint.masks()[0], EOS)


def accepts_text(text: str, *tools: dict[str, Any], **fields: Any) -> bool:
    return accepts(compiled(*tools, **fields), tokens(TOKENIZER, text))


def one_argument(schema: Any) -> dict[str, Any]:
    """Strict tool f with the argument v."""
    return {"name": "f", "strict": True, "parameters": {"properties": {"v": schema}, "required": ["v"]}}


def check(calls: Calls, tools: list[dict[str, Any]]) -> None:
    known = {tool["name"]: tool for tool in tools}
    for name, arguments in calls:
        assert name in known
        if known[name].get("strict"):
            jsonschema.validate(arguments, known[name]["parameters"])


def sample(constraint: Constraint, generator: random.Random, limit: int = 600) -> list[int] | None:
    """Random tokens up to the end; None if there is none in `limit`. Marks and brackets are likely enough to end it."""
    closing = {i for i in range(TOKENIZER.vocab_size) if set(TOKENIZER.token_bytes(i)) <= set(b'<>/"]}0')}
    closing.add(TOKENIZER.special_tokens[DSML])
    ids: list[int] = []
    while len(ids) < limit:
        allowed = np.flatnonzero(np.unpackbits(constraint.masks()[0].view(np.uint8), bitorder="little")).tolist()
        token = generator.choice([i for i in allowed if i in closing] * (generator.random() < 0.7) or allowed)
        if token == EOS:
            return ids
        ids.append(token)
        constraint.advance(token)
        assert constraint.error is None
        if constraint.complete:
            return ids
    return None


@PROPERTY
@given(st.data())
def test_every_valid_call_can_be_written(data: st.DataObject) -> None:
    drawn = data.draw(strict_tools())
    tools = [tool for tool, _ in drawn]
    calls: Calls = []
    for tool, values in data.draw(st.lists(st.sampled_from(drawn), min_size=1, max_size=3)):
        calls.append((tool["name"], data.draw(values)))
    check(calls, tools)
    text = render(calls)
    assert parse(text) == ("", calls)
    for choice in ("auto", "required"):
        assert accepts_text(text, *tools, tool_choice=choice), text
    assert accepts_text(f"So: <b>\n{text}", *tools) and not accepts_text(f"So{text}", *tools, tool_choice="required")
    opened = text.removeprefix(CallMarkup.of().before + CallMarkup.of().begin)
    assert accepts_text(opened, *tools, tool_block_open=True)
    assert accepts_text(text, *tools, parallel_tool_calls=False) == (len(calls) == 1)
    free = [{**tool, "strict": False} for tool in tools]
    assert accepts_text(text, *free), "a tool that is not strict allows no less"


def mutated(text: str, generator: random.Random) -> str:
    """The text with a small part of it removed, doubled or replaced."""
    start = generator.randrange(len(text))
    stop = min(len(text), start + generator.choice([0, 1, 1, 2, 30]))
    return text[:start] + generator.choice(["", "", text[start:stop] * 2, "x", "<", "\n", '"', "7"]) + text[stop:]


@PROPERTY
@given(st.data(), st.integers(0, 2**32))
def test_a_changed_call_is_rejected_or_still_valid(data: st.DataObject, seed: int) -> None:
    drawn = data.draw(strict_tools())
    tools, generator = [tool for tool, _ in drawn], random.Random(seed)
    tool, values = drawn[0]
    text = render([(tool["name"], data.draw(values))])
    constraint, rejected = COMPILER.compile(SamplingParams(tools=tools, tool_choice="required")), 0
    for _ in range(12):
        changed = mutated(text, generator)
        if changed == text:
            continue
        constraint = COMPILER.compile(SamplingParams(tools=tools, tool_choice="required"))
        if accepts(constraint, tokens(TOKENIZER, changed)):
            content, calls = parse(changed)
            assert not content and calls
            check(calls, tools)
        else:
            rejected += 1
    assert rejected or not tool["parameters"]["required"]


@PROPERTY
@given(strict_tools(), st.sampled_from(["auto", "required"]), st.integers(0, 2**32))
def test_random_tokens_under_the_grammar_parse_to_valid_calls(drawn: Any, choice: str, seed: int) -> None:
    tools, generator = [tool for tool, _ in drawn], random.Random(seed)
    ids = sample(COMPILER.compile(SamplingParams(tools=tools, tool_choice=choice)), generator)
    if ids is None:
        return
    try:
        text = b"".join(map(TOKENIZER.token_bytes, ids)).decode()
    except UnicodeDecodeError:
        pytest.fail("half a character")
    content, calls = parse(text)
    check(calls, tools)
    assert DSML not in content
    assert choice == "auto" or calls


def test_random_tokens_reach_calls_of_strict_and_of_free_tools() -> None:
    for tools in ([WEATHER], [NOTE, WEATHER], [{"name": "f", "parameters": {"type": "object"}}]):
        found = 0
        for seed in range(40):
            ids = sample(compiled(*tools, tool_choice="required", parallel_tool_calls=False), random.Random(seed))
            if ids is not None:
                _, calls = parse(TOKENIZER.decode(ids))
                check(calls, tools)
                found += len(calls)
        assert found > 20


WRONG: dict[str, tuple[str, str]] = {
    "a tool that is not there": ("get_weather", "get_news"),
    "a parameter that is not there": ('name="city"', 'name="town"'),
    "a missing argument": (f'<{DSML}parameter name="unit" string="true">°C</{DSML}parameter>\n', ""),
    "a value outside the enum": ("°C", "°K"),
    "a string that is too long": ("Paris", "Paris in May"),
    "a number as text": ('string="false">3', 'string="true">3'),
    "a number outside its range": (">3<", ">15<"),
    "no number": (">3<", ">three<"),
    "a tag without its line break": (f'">\n<{DSML}parameter name="city"', f'"><{DSML}parameter name="city"'),
    "another block": (f"</{DSML}tool_calls>", f"</{DSML}tool_calls>\n<{DSML}tool_calls>"),
    "text after the block": (f"</{DSML}tool_calls>", f"</{DSML}tool_calls>."),
    "no end of the call": (f"</{DSML}invoke>\n", ""),
    "a tag inside a value": ("Paris", f"</{DSML}x>"),
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_call_is_rejected(change: str) -> None:
    text = render([("get_weather", {"city": "Paris", "days": 3, "unit": "°C"})])
    assert accepts_text(text, WEATHER)
    old, new = WRONG[change]
    assert old in text and not accepts_text(text.replace(old, new, 1), WEATHER)


def test_choices() -> None:
    call, plain = render([("get_weather", HOT)]), "A plain answer, 1 < 2 </b>."
    note = render([("note", {"text": "x", "n": [1]})])
    for choice in ("auto", "none"):
        assert accepts_text(plain, WEATHER, NOTE, tool_choice=choice) and accepts_text("", WEATHER, tool_choice=choice)
    for choice in ("required", {"name": "note"}):
        assert not accepts_text(plain, WEATHER, NOTE, tool_choice=choice)
        assert not accepts_text("", WEATHER, NOTE, tool_choice=choice)
    assert accepts_text(call, WEATHER, NOTE, tool_choice="required")
    assert not accepts_text(call, WEATHER, NOTE, tool_choice="none") and not accepts_text(call)
    named = {"type": "function", "function": {"name": "note"}}
    assert accepts_text(note, WEATHER, NOTE, tool_choice=named)
    assert not accepts_text(call, WEATHER, NOTE, tool_choice=named)


def test_tags_spelled_in_characters_begin_no_block() -> None:
    text = render([("get_weather", HOT)], "x")
    assert accepts_text(text, WEATHER)
    assert not accepts(compiled(WEATHER), TOKENIZER.encode(text)), "the mark is a token"
    assert not accepts(compiled(WEATHER, tool_choice="none"), TOKENIZER.encode(f"<{DSML}tool_calls>"))
    assert accepts(compiled(WEATHER), TOKENIZER.encode(f"the mark is {DSML}, at the beginning of a tag"))


class Unmarked(Tokenizer):
    """A tokenizer in which the mark is no token."""

    @property
    def special_tokens(self) -> dict[str, int]:
        return {spelling: token for spelling, token in super().special_tokens.items() if spelling != DSML}


def test_a_tokenizer_without_the_mark_spells_it() -> None:
    tokenizer = Unmarked((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [EOS])
    text = render([("note", {"text": "a </ b", "n": {"a": 1}}), ("get_weather", HOT)], "Well < </")
    for wrong in ("", "°C"):
        constraint = compiler.compile(SamplingParams(tools=[WEATHER, NOTE]))
        assert accepts(constraint, tokenizer.encode(text.replace(wrong, "°K") if wrong else text)) == (not wrong)


def test_json_beside_calls() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    call = render([("get_weather", HOT)])
    for choice in ("auto", "none"):
        assert accepts_text('{"a": 1}', WEATHER, tool_choice=choice, json_schema=schema)
        assert not accepts_text('{"a": "1"}', WEATHER, tool_choice=choice, json_schema=schema)
        assert not accepts_text("text", WEATHER, tool_choice=choice, json_object=True)
        assert accepts_text(call, WEATHER, tool_choice=choice, json_object=True) == (choice == "auto")
    assert not accepts_text("{}" + call, WEATHER, json_object=True)
    assert not accepts_text("{}", WEATHER, tool_choice="required", json_object=True)


@PROPERTY
@given(st.data())
def test_a_string_of_a_format_is_of_that_format(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    text = data.draw(st.from_regex(rf"\A(?:{FORMATS[name]})\Z"))
    assert accepts_text(render([("f", {"v": text})]), one_argument({"type": "string", "format": name}))
    if "time" in name:
        datetime.fromisoformat(text if name == "date-time" else f"2000-01-01T{text}")
    else:
        jsonschema.FormatChecker().check(text, name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, None),
        ({"type": "string", "pattern": r"x\|y|^a\$$"}, "ax|yb"),
        ({"type": "string", "pattern": r"x\|y|^a\$$"}, "a$"),
        ({"type": "string", "format": "ipv6"}, None),
        ({"allOf": [{"type": "string", "maxLength": 3}]}, None),
        ({"type": "string", "enum": ["a", "bb"], "maxLength": 1}, "a"),
        ({"const": "x"}, "x"),
        ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, None),
        (True, "any\n\n</text>"),
    ],
)
def test_a_string_is_written_as_it_is_where_the_schema_is_plain(value: Any, text: str | None) -> None:
    tool = one_argument(value)
    if text is not None:
        assert accepts_text(render([("f", {"v": text})]), tool)
    elif isinstance(value, dict) and "(?=" in value.get("pattern", ""):
        with pytest.raises(GrammarError, match="look-ahead|lookahead|look-around"):
            compiled(tool)
    else:
        assert compiled(tool).error is None
        assert not accepts_text(render([("f", {"v": "text"})]), tool)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "tool 'f': .*uniqueItems"),
        ({"properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}, "required": ["a"]}, "Unsatisfiable"),
        ({"properties": {"a": {"minLength": -1, "type": "string"}}}, "parameter 'a': minLength is -1"),
        ({"properties": {"a": {"minLength": 3, "maxLength": 2, "type": "string"}}}, "minLength 3 is more than"),
        ({"properties": {"a": {"$ref": "#/properties/b"}}}, "\\$ref '#/properties/b' is not one of its"),
        ({"properties": {"a": {"items": {"$ref": "#"}}}}, "\\$ref '#'; allowed"),
        ({"properties": {'a"b': {}}}, "cannot be written in a tag"),
        ({"properties": {"a": 3}}, "parameter 'a': 3 is no schema"),
        ({"properties": {}, "required": ["a"]}, "requires 'a'"),
        ({"anyOf": [{"type": "object"}]}, "have 'anyOf'"),
        ({"type": "array"}, "type 'array'; allowed: object"),
        ({"properties": {"a": {"enum": ["b"], "maxLength": 0, "type": "string"}}, "required": ["a"]}, "tool 'f'"),
        (
            {"properties": {"a": {"pattern": "^b{4}$", "maxLength": 3, "type": "string"}}},
            "parameter 'a': .*nsatisfiable",
        ),
        (
            {"properties": {f"p{i}": {"type": "string", "pattern": f"(a|b{{{i}}}){{900}}c{{900}}"} for i in range(99)}},
            "",
        ),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_tool(parameters: Any, message: str) -> None:
    tool = {"name": "f", "parameters": parameters, "strict": True}
    with pytest.raises(GrammarError, match=f"SamplingParams.tools cannot be compiled: .*{message}") as refused:
        compiled(WEATHER, tool)
    assert refused.value.field == "tools" and len(str(refused.value)) < 700


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"name": 'a"'}]}, "tools\\[0\\]: tool name 'a\"'"),
        ({"tools": [NOTE, NOTE]}, "tools\\[1\\] is a second 'note'"),
        ({"tools": "note"}, "a list of tools"),
        ({"tools": [NOTE], "tool_choice": "any"}, "tool_choice is 'any'; allowed: auto, required, none"),
        ({"tools": [NOTE], "tool_choice": {"name": "x"}}, "tool_choice names 'x'; allowed: note"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [], "tool_block_open": True}, "no tool may be called"),
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": [NOTE], "regex": "a"}, "tools and regex; allowed: json_schema or json_object"),
        ({"tools": [{"name": "f", "parameters": {"a": float("nan")}}]}, "no JSON"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_the_embedded_model_calls_after_its_reasoning() -> None:
    llm = LLM(max_model_len=512)
    end = llm.tokenizer.special_tokens["</think>"]
    params = [
        SamplingParams(
            seed=seed, max_tokens=200, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
            grammar_after=(end,), logit_bias={end: 5.0},
        )
        for seed in range(12)
    ]  # fmt: skip
    found = 0
    for output in llm.generate(["What is the weather?"] * 12, params):
        if output.finish_reason != "length":
            assert output.finish_reason == "stop"
            check(parse(output.text.partition("</think>")[2])[1], [WEATHER])
            found += 1
    assert found > 3


def test_many_large_tools_compile_soon() -> None:
    properties = {f"parameter_{i}": {"type": ["string", "integer"], "description": "x" * 50} for i in range(20)}
    tools = [
        {"name": f"tool_{i}", "strict": i % 2 == 0, "parameters": {"type": "object", "properties": properties}}
        for i in range(60)
    ]
    text = render([("tool_58", {"parameter_3": "x", "parameter_19": 5})])
    assert accepts_text(text, *tools)
    assert json.dumps(tools)


CORPUS: list[Calls] = [
    [("get_weather", {"city": "Paris", "days": 3, "unit": "°C"})],
    [("get_weather", HOT), ("get_weather", {"city": "Rom\n< b", "unit": "°F"})],
    [("deep", {"rows": [{"a": 1, "b": None}, {"a": 2}], "word": "two", "kind": None})],
    [("deep", {"rows": [], "word": "one"}), ("get_weather", HOT)],
]
DEEP = {
    "name": "deep",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "rows": {"type": "array", "items": {"$ref": "#/$defs/Row"}},
            "word": {"$ref": "#/$defs/Word"},
            "kind": {"type": ["integer", "null"]},
        },
        "required": ["rows", "word"],
        "additionalProperties": False,
        "$defs": {
            "Word": {"type": "string", "enum": ["one", "two"]},
            "Row": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_xgrammar_agrees(choice: str) -> None:
    xgrammar = pytest.importorskip("xgrammar", exc_type=ImportError)
    from xgrammar.testing import _is_grammar_accept_string

    tools = [WEATHER, DEEP]
    functions = [{"type": "function", "function": tool} for tool in tools]
    tag = xgrammar.get_model_structural_tag("deepseek_v4", functions, choice, reasoning="disabled")
    oracle = xgrammar.Grammar.from_structural_tag(tag)
    generator, seen = random.Random(7), {True: 0, False: 0}
    for calls in CORPUS:
        text = render(calls, "Well." if choice == "auto" else "")
        for changed in [text, *(mutated(text, generator) for _ in range(40))]:
            accepted = accepts_text(changed, *tools, tool_choice=choice)
            theirs = _is_grammar_accept_string(oracle, changed)
            assert theirs >= accepted, changed
            if choice == "required" and theirs > accepted:  # it allows other white space between tags
                assert accepts_text(render(parse(changed)[1]), *tools), changed
            seen[accepted] += 1
    assert min(seen.values()) >= 4
