"""Tool markup: malformed answers give the same text and calls however they are cut, streamed and whole."""

from __future__ import annotations

import json
import time
from typing import Any

import deepseek_recipe as recipe
import pytest

from dsv4.conversation.tool_arguments import Value, unwrap
from dsv4.conversation.tool_markup import Text, Token, ToolMarkup
from dsv4.server.tool_inputs import ToolInputs

from .parsing import CUT_FORMS, arguments_of, input_of, unreadable
from .tool_markup_corpus import BIG, CITY, PARIS, STOPPED, TEXT, TOOLS, UNDERSTOOD, Case, M, block, invoke, parameter

CASES = [*UNDERSTOOD, *TEXT, *STOPPED]
NAMES = [case[0] for case in CASES]


def pieces(answer: str, size: int | None) -> list[str]:
    return [answer] if size is None else [answer[i : i + size] for i in range(0, len(answer), size)]


def handed_on(answer: str, size: int | None, truncated: bool = False, **options: Any) -> str:
    markup = ToolMarkup(**{"tools": TOOLS, "in_block": False, "in_thinking": False, **options})
    items: list[Token | Text] = []
    given = 0
    for piece in pieces(answer, size):
        if not markup.complete:
            given += 1
            items += markup.push(Token(0, piece))
    items += markup.finish(truncated)
    count = sum(1 if isinstance(item, Token) else item.num_tokens for item in items)
    assert count == given, "every token counts once"
    return "".join(item.text for item in items)


def parsed(
    answer: str, size: int | None, messages: bool, thinking: bool = False
) -> dict[str, tuple[str, list[tuple[str, Any]]]]:
    """(text, calls) of the answer from a protocol's stream, and from its whole answer."""
    body: dict[str, Any] = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]}
    body["thinking"] = {"type": "enabled" if thinking else "disabled"}
    options = recipe.ConversionOptions().with_model_versions_by_name({"m": recipe.ModelVersion.DeepseekV4Pro})
    kind = recipe.MessagesRequest if messages else recipe.ChatCompletionRequest
    converted = kind(json.dumps(body).encode()).convert(options)
    processor = recipe.StreamProcessor(kind.chunk_generator(converted, "id", "m"), _parsing(thinking))
    chunks = list(processor.push(recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage(prompt_tokens=1))))
    markup = ToolMarkup(TOOLS, False, thinking, cut_form=CUT_FORMS["messages" if messages else "chat"])

    def parse(items: list[Token | Text]) -> None:
        for item in items:
            if not processor.finished:
                chunks.extend(processor.push(recipe.InferenceChunk.text(item.text, 1)))

    for piece in pieces(answer, size):
        parse(markup.push(Token(0, piece)))
    parse(markup.finish(False))
    if not processor.finished:
        chunks += processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
        if not processor.finished:
            chunks += processor.finish()
    events = [json.loads(chunk.to_json()) for chunk in chunks]
    inputs = ToolInputs()
    for event in events:
        inputs.add(json.dumps(event))
    response = (recipe.MessagesResponse if messages else recipe.ChatCompletionResponse)("id", "m", 0, 1, 0)
    for chunk in chunks:
        response.accumulate(chunk)
    whole = json.loads(inputs.restore(response.to_json()))
    return {"stream": (of_messages if messages else of_chat)(events), "whole": of_whole(whole, messages)}


def _parsing(thinking: bool) -> recipe.ParsingOptions:
    return recipe.ParsingOptions(
        thinking_initial_stage=recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    )


def of_chat(events: list[dict[str, Any]]) -> tuple[str, list[tuple[str, Any]]]:
    text, calls = "", dict[int, list[str]]()
    for delta in (choice["delta"] for event in events for choice in event["choices"]):
        text += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            found = calls.setdefault(call["index"], ["", ""])
            found[0] += call["function"].get("name") or ""
            found[1] += call["function"].get("arguments") or ""
    return text, [(name, arguments_of(arguments)) for name, arguments in calls.values()]


def of_messages(events: list[dict[str, Any]]) -> tuple[str, list[tuple[str, Any]]]:
    text, calls = "", dict[int, list[str]]()
    for event in events:
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            calls[event["index"]] = [event["content_block"]["name"], ""]
        if event["type"] == "content_block_delta":
            text += event["delta"].get("text", "")
            if "partial_json" in event["delta"]:
                calls[event["index"]][1] += event["delta"]["partial_json"]
    return text, [(name, arguments_of(arguments)) for name, arguments in calls.values()]


def of_whole(answer: dict[str, Any], messages: bool) -> tuple[str, list[tuple[str, Any]]]:
    if messages:
        text = "".join(b["text"] for b in answer["content"] if b["type"] == "text")
        return text, [(b["name"], input_of(b["input"])) for b in answer["content"] if b["type"] == "tool_use"]
    message = answer["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return message.get("content") or "", [(call["name"], arguments_of(call["arguments"])) for call in calls]


def of_protocol(calls: list[tuple[str, Any]], messages: bool) -> list[tuple[str, Any]]:
    """Calls as a protocol's client has them: one in which the model has stopped is told otherwise."""
    return [(name, unreadable(a) if isinstance(a, str) and not messages else a) for name, a in calls]


@pytest.mark.parametrize("messages", [False, True], ids=["chat", "messages"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_stream_and_whole_agree_however_the_answer_is_cut(case: Case, messages: bool) -> None:
    _, answer, text, calls = case
    for size in (None, 1, 2, 7):
        found = parsed(answer, size, messages)
        assert found["stream"] == found["whole"], size
        said, got = found["whole"]
        assert (" ".join(said.split()), got) == (" ".join(text.split()), of_protocol(calls, messages)), size


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_no_tag_is_left_without_tools(case: Case) -> None:
    _, answer, text, calls = case
    for size in (None, 1, 3):
        said = handed_on(answer, size, tools=None)
        assert "tool_calls>" not in said.replace("<tool_calls>", "") and f"<{M}" not in said and f"</{M}" not in said
        assert all(name in said for name, given in calls if isinstance(given, dict)) and set(text.split()) <= set(
            said.split()
        )


def test_arguments_leave_their_wrapper_whatever_their_names_are_made_of() -> None:
    """A letter of the mark is read as another, so that it makes no tag."""
    schema = {"a｜b": {}, "c": {}}
    inner = {"a\udcbbb": Value("1", False)}
    wrapper = {"arguments": Value('{"a\udcbbb": 1}', False)}
    assert unwrap("f", wrapper, schema) == inner
    for name, said in (("ü", Value("ü", True)), ("ü", Value('"\\u00fc"', False)), ("f", Value('"f"', False))):
        assert unwrap(name, wrapper | {"name": said}, schema) == inner
        assert unwrap("other", wrapper | {"name": said}, schema) == wrapper | {"name": said}
    assert unwrap("f", {"arguments": Value('{"d": 1}', False)}, schema) == {"arguments": Value('{"d": 1}', False)}


def test_a_well_formed_block_keeps_its_tokens() -> None:
    answer = "I look.\n\n" + block(invoke(PARIS))
    markup = ToolMarkup(TOOLS, False, False)
    tokens = [Token(i, piece) for i, piece in enumerate(pieces(answer, 3))]
    items = [item for token in tokens for item in markup.push(token)] + markup.finish(False)
    ids = [item.token_id for item in items if isinstance(item, Token)]
    # Tokens across the beginning of the block and the end of the call are cut in two.
    assert len(tokens) - len(ids) <= 2 and ids == sorted(ids)


def test_a_block_opened_by_the_prompt_is_completed() -> None:
    inner = block(invoke('{"days": 3}')).split("\n", 1)[1]
    assert handed_on(inner, 1, in_block=True) == block(invoke(parameter("days", "3", "false")))
    assert handed_on(block(invoke(PARIS)).split("\n", 1)[1], 4, in_block=True) == block(invoke(PARIS))


def test_a_truncated_call_is_no_call() -> None:
    cut = block(invoke(PARIS)).split(f"</{M}invoke>")[0]
    assert "Paris" in handed_on(cut, 1, truncated=True) and M not in handed_on(cut, 1, truncated=True)
    assert handed_on(cut, 1) == block(invoke(PARIS)), "ended by the model, not cut off"
    second = block(invoke(PARIS)).removesuffix(f"</{M}tool_calls>") + f'<{M}invoke name="weather">{PARIS}'
    assert handed_on(second, 5, truncated=True).count(f"<{M}invoke") == 1
    for end in ("<", "</", f"</{M[:3]}"):
        cut = block(invoke(PARIS)).removesuffix(f"</{M}tool_calls>") + end
        assert handed_on(cut, 1, truncated=True) == block(invoke(PARIS)), "the beginning of a tag is no text"


@pytest.mark.parametrize("messages", [False, True], ids=["chat", "messages"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_call_in_unclosed_reasoning_is_parsed_alike(case: Case, messages: bool) -> None:
    _, answer, _, calls = case
    for size in (None, 1, 5):
        found = parsed("I think.\n\n" + answer, size, messages, thinking=True)
        assert found["stream"] == found["whole"] == ("", of_protocol(calls, messages)), size


def test_reasoning_about_markup_is_text_without_tags() -> None:
    call = block(invoke(PARIS))
    for size in (1, 4, None):
        said = handed_on(f"perhaps <{M}tool_calls> or not</think>{call}", size, in_thinking=True)
        assert said == f"perhaps or not</think>{call}"
        said = handed_on(f'<{M}invoke name="f"> begins one</think>Answer.', size, in_thinking=True)
        assert said == "begins one</think>Answer."
        assert handed_on(f"a {call} b", size, in_thinking=True) == f"a {call}"
        assert handed_on("a </think> b </think> c", size, in_thinking=True) == "a </think> b </think> c"


def test_an_end_of_thinking_in_a_value_belongs_to_the_value() -> None:
    call = block(invoke(parameter("city", "a</think>b")))
    for size in (1, 3, None):
        assert handed_on("so " + call, size, in_thinking=True) == "so " + call


def test_a_mark_in_an_answer_does_not_hold_the_rest_back() -> None:
    markup = ToolMarkup(TOOLS, False, False)
    said = "".join(item.text for piece in f"The mark <{M} begins a call" for item in markup.push(Token(0, piece)))
    assert said == "The mark  begins a call"


@pytest.mark.parametrize(
    "answer",
    [
        f"<{M}tool_calls>" + f"<{M}invoke " * 20_000,
        f'<{M}invoke name="a">' * 10_000 + f'<{M}parameter name="a">' * 10_000,
        block(invoke(parameter("city", "x" * 1_000_000))),
        block(invoke("{" + ", ".join(f'"n{i}": {i}' for i in range(30_000)) + "}")),
        f'<{M}invoke name="' * 20_000,
        f"<{M}" * 50_000,
    ],
    ids=["names cut off", "never ended", "a long value", "many members", "quotes never ended", "marks"],
)
def test_repeated_markup_takes_linear_time(answer: str) -> None:
    """A model that repeats itself must not stall the server: time per token stays constant."""
    begin = time.process_time()
    handed_on(answer, 4)
    assert time.process_time() - begin < 5 * 1e-4 * len(answer) / 4 + 1, "of 4 letters: 0.5 ms at most"


def test_text_is_not_held_back_longer_than_it_may_be_markup() -> None:
    markup = ToolMarkup(TOOLS, False, False)
    assert markup.push(Token(1, "a <")) == []
    assert [item.text for item in markup.push(Token(2, "b"))] == ["a <", "b"]
    assert [item.text for item in markup.push(Token(3, "plain"))] == ["plain"]


def test_the_corpus_has_every_observed_fault() -> None:
    assert len(CASES) >= 50 and ("weather", {"days": BIG}) in [c[3][0] for c in UNDERSTOOD if c[3]]
    assert sum(case[3] == [CITY] for case in CASES) >= 10
