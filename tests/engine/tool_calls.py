"""Tools, calls and their markup for tests: random ones, written and read by deepseek-recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import deepseek_recipe as recipe
from hypothesis import strategies as st

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import DSML

Calls = list[tuple[str, dict[str, Any]]]

WEATHER = {
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 9},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": "string", "enum": ["°C", "°F"]},
        },
        "required": ["city", "unit"],
    },
}
NOTE = {"name": "note", "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "n": {}}}}


def render(calls: Calls, content: str = "") -> str:
    """An answer with these calls, up to the end of the sentence."""
    written = [recipe.ToolCall(str(i), name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls)]
    conversation = recipe.Conversation(
        [recipe.UserMessage("q"), recipe.AssistantMessage(content, None, written), recipe.UserMessage("next")],
        tools=[recipe.ToolDefinition("t", None, {})],
        thinking_mode=False,
    )
    prompt = recipe.DeepseekV4Encoding().render_conversation(conversation).prompt
    return prompt.split("</think>")[-2].partition("<｜end▁of▁sentence｜>")[0]


def tokens(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Tokens of an answer in which every mark is the special token."""
    first, *rest = answer.split(DSML)
    mark = tokenizer.special_tokens[DSML]
    return tokenizer.encode(first) + [token for part in rest for token in (mark, *tokenizer.encode(part))]


def parse(text: str) -> tuple[str, Calls]:
    """(content, calls) of an answer, as deepseek-recipe's own parser reads it."""
    generator = recipe.MessagesChunkGenerator("id", "m", False)
    stream = recipe.StreamProcessor(generator, recipe.ParsingOptions(), None)
    events = stream.push(recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage()))
    events += stream.push(recipe.InferenceChunk.text(text, 1))
    if not stream.finished:
        events += stream.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)) + (
            [] if stream.finished else stream.finish()
        )
    content, calls, inputs = "", [], []
    for event in map(json.loads, (event.to_json() for event in events)):
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls.append(event["content_block"]["name"])
            inputs.append("")
        delta = event.get("delta", {})
        content += delta.get("text", "")
        if "partial_json" in delta:
            inputs[-1] += delta["partial_json"]
    return content, [(name, json.loads(text or "{}")) for name, text in zip(calls, inputs, strict=True)]


# Random schemas, each with a strategy of its values. Strings hold no tag: markup has no escape for one.
INTEGERS = st.integers(-(2**63), 2**63 - 1)  # deepseek-recipe writes others as floats
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="｜\r"), max_size=12)
NAMES = st.text("abcXYZ019_-é日", min_size=1, max_size=6)


def _of(schema: Mapping[str, Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just((schema, values))


SIMPLE = st.one_of(
    _of({"type": "string"}, TEXTS),
    _of({"type": "string", "minLength": 2, "maxLength": 4}, TEXTS.filter(lambda text: 2 <= len(text) <= 4)),
    _of({"type": "string", "pattern": "^[a-c]+(x|y)$"}, st.from_regex(r"\A[a-c]{1,4}(x|y)\Z")),
    _of({"type": "string", "pattern": "^a|b{2}$|[|]"}, st.from_regex(r"\A(a[m-z]{0,3}|[m-z]{0,3}bb|x[|]y)\Z")),
    _of({"type": "string", "format": "ipv4"}, st.ip_addresses(v=4).map(str)),
    _of({"type": "string", "format": "uuid"}, st.uuids().map(str)),
    _of({"type": "integer", "minimum": -3, "maximum": 99}, st.integers(-3, 99)),
    _of({"type": "number"}, st.floats(-1e6, 1e6).map(lambda value: round(value, 3))),
    _of({"type": "boolean"}, st.booleans()),
    _of({"type": ["string", "null"], "maxLength": 3}, st.none() | st.text("ab \n<", max_size=3)),
    _of({"enum": ["red", "größe", 3, None, "</b>"]}, st.sampled_from(["red", "größe", 3, None, "</b>"])),
    _of({"type": "string", "const": 'a"b'}, st.just('a"b')),
    _of({"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}]}, TEXTS.filter(bool) | INTEGERS),
    _of({"$ref": "#/$defs/Word"}, st.sampled_from(["one", "two"])),
    _of({"type": "array", "items": {"$ref": "#/$defs/Word"}}, st.lists(st.sampled_from(["one", "two"]), max_size=3)),
    _of({}, TEXTS | INTEGERS | st.lists(st.booleans(), max_size=2)),
)  # fmt: skip


def _object(members: Sequence[tuple[str, Any, bool]]) -> tuple[dict[str, Any], st.SearchStrategy[dict[str, Any]]]:
    properties = {name: schema for name, (schema, _), _ in members}
    required = {name: values for name, (_, values), needed in members if needed}
    optional = {name: values for name, (_, values), needed in members if not needed}
    schema = {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}
    values = st.fixed_dictionaries(required, optional=optional)
    return schema, values.map(lambda found: {name: found[name] for name in properties if name in found})


def _objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    members = st.lists(st.tuples(NAMES, values, st.booleans()), max_size=4, unique_by=lambda member: member[0])
    return members.map(_object)


VALUES = st.one_of(SIMPLE, SIMPLE, _objects(SIMPLE))


@st.composite
def strict_tools(draw: st.DrawFn) -> list[tuple[dict[str, Any], st.SearchStrategy[dict[str, Any]]]]:
    """One to three strict tools, each with a strategy of its arguments."""
    found = []
    for name in draw(st.lists(st.text("abc_-9", min_size=1, max_size=5), min_size=1, max_size=3, unique=True)):
        schema, values = draw(_objects(VALUES))
        schema = {**schema, "$defs": {"Word": {"enum": ["one", "two"]}}}
        found.append(({"name": name, "parameters": schema, "strict": True}, values))
    return found
