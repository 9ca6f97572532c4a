"""Prompts of generated requests: the same ids as deepseek-recipe gives for the same body, in every protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.conversation.model import ConversationModel
from dsv4.engine import LLM
from dsv4.server.chat_completions import CHAT
from dsv4.server.errors import RequestError
from dsv4.server.messages import MESSAGES
from dsv4.server.model_names import conversion_options
from dsv4.server.responses import RESPONSES

from .scripted_model import ScriptedModel

FORMATS = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}
OPTIONS = conversion_options(["tiny"])
GENERATED = settings(max_examples=60, deadline=None, derandomize=True, database=None)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12),
    st.lists(
        st.sampled_from(["<｜User｜>", "</think>", "<think>", "｜DSML｜", "<｜end▁of▁sentence｜>", "a", " ", "\n"]),
        min_size=1,
        max_size=4,
    ).map("".join),
)
ARGUMENTS = st.dictionaries(
    st.from_regex(r"[a-z_]{1,6}", fullmatch=True),
    TEXTS | st.integers(-(2**53), 2**53) | st.booleans() | st.lists(st.integers(0, 9), max_size=2),
    max_size=3,
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
# A turn: (text of the user, reasoning, text, calls with results) of what followed.
TURNS = st.lists(
    st.tuples(TEXTS, st.none() | TEXTS, TEXTS, st.lists(st.tuples(ARGUMENTS, TEXTS), max_size=2)), max_size=3
)


def chat(turns: list[Any], system: str | None, last: str, effort: str | None) -> dict[str, Any]:
    messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    for place, (asked, reasoning, said, calls) in enumerate(turns):
        made = [
            {"id": f"c{place}_{i}", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
            for i, (arguments, _) in enumerate(calls)
        ]
        answer = {"role": "assistant", "content": said} | ({"tool_calls": made} if made else {})
        answer |= {} if reasoning is None else {"reasoning_content": reasoning}
        results = [{"role": "tool", "tool_call_id": f"c{place}_{i}", "content": r} for i, (_, r) in enumerate(calls)]
        messages += [{"role": "user", "content": asked}, answer, *results]
    body: dict[str, Any] = {"model": "tiny", "messages": [*messages, {"role": "user", "content": last}]}
    return body | ({} if effort is None else {"reasoning_effort": effort})


def messages(turns: list[Any], system: str | None, last: str, effort: str | None) -> dict[str, Any]:
    found: list[Any] = []
    waiting: list[Any] = []
    for place, (asked, reasoning, said, calls) in enumerate(turns):
        blocks: list[Any] = [{"type": "text", "text": said}]
        if reasoning is not None:
            blocks.insert(0, {"type": "thinking", "thinking": reasoning, "signature": "s"})
        names = [f"c{place}_{i}" for i in range(len(calls))]
        for name, (arguments, _) in zip(names, calls, strict=True):
            blocks.append({"type": "tool_use", "id": name, "name": "f", "input": arguments})
        found += [{"role": "user", "content": [*waiting, {"type": "text", "text": asked}]}]
        found += [{"role": "assistant", "content": blocks}]
        waiting = [
            {"type": "tool_result", "tool_use_id": i, "content": r} for i, (_, r) in zip(names, calls, strict=True)
        ]
    found.append({"role": "user", "content": [*waiting, {"type": "text", "text": last}]})
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": found}
    body |= {} if system is None else {"system": system}
    if effort is not None:
        body |= {"thinking": {"type": "disabled"}} if effort == "none" else {"output_config": {"effort": effort}}
    return body


def responses(turns: list[Any], system: str | None, last: str, effort: str | None) -> dict[str, Any]:
    items: list[Any] = []
    for place, (asked, reasoning, said, calls) in enumerate(turns):
        items.append({"type": "message", "role": "user", "content": asked})
        if reasoning is not None:
            part = {"type": "reasoning_text", "text": reasoning}
            items.append({"type": "reasoning", "id": f"r{place}", "summary": [], "content": [part]})
        items.append({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": said}]})
        for i, (arguments, _) in enumerate(calls):
            call_id = f"c{place}_{i}"
            items.append({"type": "function_call", "call_id": call_id, "name": "f", "arguments": json.dumps(arguments)})
        for i, (_, result) in enumerate(calls):
            items.append({"type": "function_call_output", "call_id": f"c{place}_{i}", "output": result})
    items.append({"type": "message", "role": "user", "content": last})
    body: dict[str, Any] = {"model": "tiny", "input": items}
    body |= {} if system is None else {"instructions": system}
    return body | ({} if effort is None else {"reasoning": {"effort": effort}})


MAKERS = {"chat": chat, "messages": messages, "responses": responses}
TOOLS = {
    "chat": {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
    "messages": {"name": "f", "description": "d", "input_schema": SCHEMA},
    "responses": {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": False},
}


@pytest.fixture(scope="module")
def conversations(folder: Path) -> ConversationModel:
    return ConversationModel(LLM(ScriptedModel(folder), folder=folder))


@pytest.fixture(scope="module")
def reference(folder: Path) -> recipe.DeepseekV4Encoding:
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.mark.parametrize("protocol", FORMATS)
@GENERATED
@given(TURNS, st.none() | TEXTS, TEXTS, st.sampled_from([None, "none", "low", "medium", "high", "max"]), st.booleans())
def test_prompts_are_those_of_deepseek_recipe(
    conversations: ConversationModel,
    reference: recipe.DeepseekV4Encoding,
    protocol: str,
    turns: list[Any],
    system: str | None,
    last: str,
    effort: str | None,
    tools: bool,
) -> None:
    body = MAKERS[protocol](turns, system, last, effort)
    if tools:
        body["tools"] = [TOOLS[protocol]]
    data = json.dumps(body).encode()
    wire = FORMATS[protocol]
    try:
        wanted = wire.request(data).convert(OPTIONS).conversation
    except (recipe.ConversionError, ValueError) as error:
        with pytest.raises(RequestError) as refused:
            wire.read(data, OPTIONS)
        assert str(error).partition(":")[0] in refused.value.message or refused.value.status == 400
        return
    request = wire.read(data, OPTIONS)
    ids = request.prompt_token_ids(conversations)
    if wanted.thinking_mode or all(turn[1] is None for turn in turns):
        assert ids == reference.encode(wanted)
    assert request.count_tokens(conversations) == len(ids)
