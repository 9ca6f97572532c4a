"""Samples of fine-tuning: one per turn or per conversation, masks, refusals by line, the dry run's colors."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsv4.config import nano_path
from dsv4.data.records import MESSAGES, find_sources
from dsv4.data.shards import ShardFolder
from dsv4.data.tokenizing import ShardWriter
from dsv4.post_training.sft_preview import SPECIAL, TRAINED, colored, listed, marked, show_samples
from dsv4.post_training.sft_samples import Refusal, Sample, TurnSource, read_samples
from dsv4.tokenizer.prompts import PromptEncoder

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, thinking: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": thinking, **more}


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return PromptEncoder.from_pretrained(nano_path())


def read(tmp_path: Path, prompts: PromptEncoder, *lines: Any, max_tokens: int | None = None) -> list[Sample | Refusal]:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return list(read_samples(find_sources([str(path)]), prompts, max_tokens))


def trained(sample: Sample, prompts: PromptEncoder) -> str:
    """Text of the tokens with loss."""
    assert sample.encoded.mask is not None
    return prompts.tokenizer.decode(sample.encoded.ids[sample.encoded.mask == 1].tolist())


def test_answers_of_weight_0_are_context(tmp_path: Path, prompts: PromptEncoder) -> None:
    turns = [user("Hi"), assistant("Hello", weight=0), user("2+2"), assistant("4", weight=1), user("So?")]
    (sample,) = read(tmp_path, prompts, {"messages": [*turns, assistant("Bye", weight=0)]})
    (all_learned,) = read(
        tmp_path, prompts, {"messages": [user("Hi"), assistant("Hello"), user("2+2"), assistant("4")]}
    )
    assert isinstance(sample, Sample) and isinstance(all_learned, Sample)
    assert sample.turn == 3 and sample.encoded.ids.tolist() == all_learned.encoded.ids.tolist()
    assert "Hello" in trained(all_learned, prompts) and "Hello" not in trained(sample, prompts)
    assert "4" in trained(sample, prompts)


def test_thinking_turns_of_weight_0_are_no_samples(tmp_path: Path, prompts: PromptEncoder) -> None:
    called = assistant("", "look it up", tool_calls=[CALL], weight=0)
    result = {"role": "tool", "tool_call_id": "c1", "content": "sun"}
    talk = {
        "messages": [user("Rome?"), called, result, assistant("Sun.", "so"), user("And?"), assistant("Bye", weight=0)]
    }
    (sample,) = read(tmp_path, prompts, talk | {"tools": [WEATHER]})
    assert isinstance(sample, Sample) and sample.turn == 3
    assert "look it up" in prompts.tokenizer.decode(sample.encoded.ids.tolist())
    assert "look it up" not in trained(sample, prompts) and "so</think>Sun." in trained(sample, prompts)
    plain = {"messages": [user("Hi"), assistant("a", "b", weight=0), user("2+2"), assistant("4", "two")]}
    assert [one.turn for one in read(tmp_path, prompts, plain) if isinstance(one, Sample)] == [3]


def test_a_thinking_conversation_without_tools_is_a_sample_per_turn(tmp_path: Path, prompts: PromptEncoder) -> None:
    talk = {"messages": [user("Hi"), assistant("Hello", "greet"), user("2+2"), assistant("4", "two and two")]}
    first, second = read(tmp_path, prompts, talk)
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert (first.turn, second.turn) == (1, 3)
    assert "greet</think>Hello" in trained(first, prompts)
    assert "two and two</think>4" in trained(second, prompts)
    whole = prompts.tokenizer.decode(second.encoded.ids.tolist())
    assert "greet" not in whole and "Hello" in whole and "Hello" not in trained(second, prompts)


def test_a_turn_without_reasoning_has_empty_thinking_in_a_conversation_with_some(
    tmp_path: Path, prompts: PromptEncoder
) -> None:
    """Its sample shows no later turn, whose reasoning makes the conversation one with thinking."""
    messages = [user("Hi"), assistant("Hello"), user("2+2?"), assistant("4", "two and two")]
    talk = {"messages": messages, "reasoning_effort": "max"}
    first, second = read(tmp_path, prompts, talk)
    plain, *_ = read(tmp_path, prompts, {"messages": messages[:2], "reasoning_effort": "max"})
    assert isinstance(first, Sample) and isinstance(second, Sample) and isinstance(plain, Sample)
    assert trained(first, prompts).startswith("</think>Hello")
    assert trained(plain, prompts).startswith("Hello")
    texts = [prompts.tokenizer.decode(sample.encoded.ids.tolist()) for sample in (first, second, plain)]
    assert texts[0].partition("Hi")[0] == texts[1].partition("Hi")[0]  # the instruction of the effort
    assert len(texts[0].partition("Hi")[0]) > len(texts[2].partition("Hi")[0])
    source = TurnSource(find_sources([str(tmp_path / "talks.jsonl")])[0], prompts, 100_000)
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk))
    ShardWriter([source], nano_path(), tmp_path / "shards").run()
    written = [ShardFolder(tmp_path / "shards").document(number)[0].tolist() for number in range(2)]
    assert written == [first.encoded.ids.tolist(), second.encoded.ids.tolist()]


def test_a_trajectory_with_tools_is_one_sample_that_keeps_its_thinking(tmp_path: Path, prompts: PromptEncoder) -> None:
    messages = [
        user("Weather in Rome?"),
        assistant("", "ask the tool", tool_calls=[CALL]),
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        assistant("It is sunny.", "it said sunny"),
    ]
    (sample,) = read(tmp_path, prompts, {"messages": messages, "tools": [WEATHER]})
    assert isinstance(sample, Sample) and sample.turn == 3
    text = trained(sample, prompts)
    assert "ask the tool" in text and "weather" in text and "it said sunny</think>It is sunny." in text
    assert "sunny</tool_result>" not in text.replace(" ", "")


def test_a_conversation_without_thinking_is_one_sample_with_loss_on_every_answer(
    tmp_path: Path, prompts: PromptEncoder
) -> None:
    (sample,) = read(tmp_path, prompts, {"messages": [user("Hi"), assistant("Hello"), user("2+2"), assistant("4")]})
    assert isinstance(sample, Sample)
    text = trained(sample, prompts)
    assert "Hello" in text and "4" in text and "2+2" not in text


def test_refusals_name_the_line_and_the_reason(tmp_path: Path, prompts: PromptEncoder) -> None:
    good = {"messages": [user("Hi"), assistant("Hello")]}
    items = read(
        tmp_path, prompts, good, "{no json", {"text": "plain"}, {"messages": [user("Hi")]}, {"messages": ["Hi"]},
        {"messages": [user("Hi"), {"role": "robot", "content": "x"}, assistant("a")]},
        {"messages": [user("Hi"), assistant("x" * 500)]}, good, max_tokens=64,
    )  # fmt: skip
    assert [type(item) for item in items] == [Sample, *[Refusal] * 6, Sample]
    reasons = [(item.place.rpartition(":")[2], item.reason) for item in items if isinstance(item, Refusal)]
    assert [line for line, _ in reasons] == ["2", "3", "4", "5", "6", "7"]
    for (_, reason), words in zip(
        reasons,
        ("no JSON", "a plain text", "no message of the assistant", "objects with a role", "robot", "allowed: 64"),
        strict=True,
    ):
        assert words in reason


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "parameters": parameters}}


def call(**function: Any) -> dict[str, Any]:
    return CALL | {"function": CALL["function"] | function}


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
# A row, and words of its refusal.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [user("Hi"), RESULT, assistant("a")]}, "must be a response to a preceding message with 'tool_calls'"),
    ({"messages": [user("Hi"), assistant("a")], "tools": [tool({"type": "objekt"})]}, "Invalid schema for function"),
    ({"messages": [user("Hi"), assistant("a")], "tools": {"a": 1}}, "tools: invalid type: map"),
    ({"messages": [{"role": "user", "content": [PICTURE]}, assistant("a")]}, "image (messages[0].content[0])"),
    ({"messages": [{"role": "user", "content": 3}, assistant("a")]}, "messages[0].content: content should be a string"),
    ({"messages": [user("Hi"), assistant("", tool_calls=["x"])]}, "messages[1].tool_calls[0]: invalid type: string"),
    ({"messages": [user("Hi"), assistant("", tool_calls="x")]}, "messages[1].tool_calls: invalid type: string"),
    ({"messages": [user("Hi"), assistant("", tool_calls=[call(arguments="[1]")])]}, "arguments: '[1]'; a JSON object"),
    ({"messages": [user("Hi"), assistant("", tool_calls=[call(arguments={})])]}, "arguments: invalid type: map"),
    (
        {"messages": [user("Hi"), assistant("", tool_calls=[call(arguments="no")]), RESULT, assistant("a")]},
        "messages[1].tool_calls[0].function.arguments: 'no'; a JSON object is allowed",
    ),
    ({"messages": [user("Hi"), assistant("a", 5)]}, "messages[1].reasoning_content: invalid type: integer"),
    ({"messages": [user("Hi"), assistant("a", reasoning={})]}, "messages[1].reasoning: dict; a text is allowed"),
    ({"messages": [user("Hi"), assistant("a", weight=0)]}, "all messages of the assistant have weight 0; at least one"),
    ({"messages": [user("Hi"), assistant("a", weight=0.5)]}, "messages[1].weight: 0.5; 0 and 1 are allowed"),
    ({"messages": [user("Hi"), assistant("a", function_call={})]}, "messages[1].function_call: calls are allowed in"),
    ({"messages": [user("Hi"), assistant("a")], "functions": [1]}, "declare functions in `tools`"),
    ({"messages": [user("Hi"), assistant("a")], "system": "Be."}, "send a message of the role system"),
    (
        {"messages": [user("Hi"), assistant("a", "b")], "reasoning_effort": "most"},
        "unknown variant `most`, expected one of",
    ),
    ({"messages": [user("Hi"), assistant("a", "b")], "reasoning_effort": True}, "invalid type: boolean `true`"),
    ({"messages": [user("Hi"), assistant("a", "b")], "reasoning_effort": "none"}, "reasoning_effort is none, but"),
    ({"messages": [user("Hi"), assistant("a"), "x"]}, "objects with a role"),
    ({"messages": [user("\ud800"), assistant("a")]}, "messages[0].content holds bytes or escapes that are no text"),
]


def test_every_bad_row_is_refused_in_words(tmp_path: Path, prompts: PromptEncoder) -> None:
    items = read(tmp_path, prompts, *(row for row, _ in REFUSED), '{"messages": ' + "[" * 100_000)
    for number, (item, (_, words)) in enumerate(zip(items, [*REFUSED, ({}, "no JSON")], strict=True), 1):
        assert isinstance(item, Refusal) and item.place.endswith(f"talks.jsonl:{number}"), item
        assert words in item.reason, item.reason


def test_a_fault_of_earlier_messages_is_said_once(tmp_path: Path, prompts: PromptEncoder) -> None:
    turns = [user("Hi"), assistant("a", "b")]
    first, refused, last = read(tmp_path, prompts, {"messages": [*turns, RESULT, turns[1], *turns, *turns]}, "{no json")
    assert isinstance(first, Sample) and isinstance(refused, Refusal) and isinstance(last, Refusal)
    assert refused.reason.startswith("messages[3]: ") and "(messages[2])" in refused.reason
    assert last.place.endswith(":2")


def test_a_quick_instruction_is_one_sample_with_loss_on_its_answer(tmp_path: Path, prompts: PromptEncoder) -> None:
    talk = [user("Hi"), assistant("Hello", "A greeting."), user("Is it wet in Oslo?")]
    rows = [
        {"messages": [*talk[:2], talk[2] | {"task": "query"}, assistant("rain Oslo")]},
        {"messages": [talk[2] | {"task": "action"}, assistant("Search")]},
        {"messages": [talk[2] | {"task": "action"}, assistant("Search")], "reasoning_effort": "high"},
        {"messages": [talk[0], talk[1] | {"task": "title"}, assistant("Greeting")]},
    ]
    samples = read(tmp_path, prompts, *rows)
    texts = []
    for sample in samples:
        assert isinstance(sample, Sample)
        texts.append(prompts.tokenizer.decode(sample.encoded.ids.tolist()))
        answer = sample.record["messages"][-1]["content"]
        assert trained(sample, prompts) == f"{answer}<｜end▁of▁sentence｜>"
        assert sample.encoded.num_bytes == sum(len(m["content"]) for m in sample.record["messages"])
    assert "A greeting" not in texts[0] and "<｜User｜>Is it wet in Oslo?<｜query｜>rain Oslo" in texts[0]
    assert "</think><｜action｜>Search" in texts[1] and "<think><｜action｜>Search" in texts[2]
    assert "A greeting.</think>Hello<｜end▁of▁sentence｜><｜title｜>Greeting" in texts[3]


def test_quick_instructions_are_refused_in_words(tmp_path: Path, prompts: PromptEncoder) -> None:
    asked = user("Hi") | {"task": "query"}
    found = read(
        tmp_path, prompts,
        {"messages": [user("Hi") | {"task": "ask"}, assistant("x")]},
        {"messages": [asked, assistant("x"), user("y"), assistant("z")]},
        {"messages": [user("Hi"), assistant("x", task="title")]},
        {"messages": [asked, assistant("x", "Hm.")]},
        {"messages": [asked, assistant("", tool_calls=[CALL])]},
        {"messages": [user("Hi") | {"task": "title"}, assistant("x")]},
        {"messages": [user("Hi") | {"task": "read_url"}, assistant("x")]},
    )  # fmt: skip
    reasons = [one.reason for one in found if isinstance(one, Refusal)]
    for reason, wanted in zip(reasons, [
        "messages[0].task: 'ask'; allowed: action, query, authority, domain, read_url, title",
        "messages[0].task: allowed on the message before the last, whose answer is learned",
        "messages[1].task: allowed on the message before the last, whose answer is learned",
        "messages[1]: a message of the assistant with reasoning_content answers the task query; allowed: one",
        "messages[1]: a message of the assistant with tool_calls answers the task query; allowed: one",
        "title: the conversation ends with a message of the user; allowed: one that ends with the assistant's",
        "read_url: the user's text has no <｜extracted_url｜>",
    ], strict=True):  # fmt: skip
        assert wanted in reason, reason


def test_rows_are_read_as_the_api_reads_them(tmp_path: Path, prompts: PromptEncoder) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    same: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"messages": [{"role": "user", "content": parts}, assistant("a")]},
            {"messages": [user("Hi\n\nthere"), assistant("a")]},
        ),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": "a", "reasoning": "hm"}]},
            {"messages": [user("Hi"), assistant("a", "hm")]},
        ),
        (
            {"messages": [{"role": "developer", "content": "Be."}, user("Hi"), assistant("a", tool_calls=[])]},
            {"messages": [{"role": "system", "content": "Be."}, user("Hi"), assistant("a")]},
        ),
        (
            {"messages": [user("Hi"), assistant("a", "hm")], "reasoning_effort": "ultra", "prompt": "of another tool"},
            {"messages": [user("Hi"), assistant("a", "hm")], "reasoning_effort": "max"},
        ),
        (
            {"messages": [user("Hi"), assistant("", tool_calls=[{"type": "function", "function": CALL["function"]}])]},
            {"messages": [user("Hi"), assistant("", tool_calls=[CALL])]},
        ),
    ]
    for given, meant in same:
        one, other = read(tmp_path, prompts, given, meant)
        assert isinstance(one, Sample) and isinstance(other, Sample), (one, other)
        assert one.encoded.ids.tolist() == other.encoded.ids.tolist()
        assert one.encoded.mask is not None and other.encoded.mask is not None
        assert one.encoded.mask.tolist() == other.encoded.mask.tolist()


def test_calls_without_declared_tools_are_a_sample_per_turn(tmp_path: Path, prompts: PromptEncoder) -> None:
    """Their prompt drops earlier thinking, as that of any conversation without tools."""
    messages = [user("Rome?"), assistant("", "ask", tool_calls=[CALL]), RESULT, assistant("Sunny.", "it said so")]
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        first, second = read(tmp_path, prompts, {"messages": messages, **more})
        assert isinstance(first, Sample) and isinstance(second, Sample)
        assert trained(first, prompts).startswith("ask</think>")
        assert trained(second, prompts).startswith("it said so</think>Sunny.")


def test_a_row_with_a_text_beside_its_messages_is_a_conversation_here(tmp_path: Path, prompts: PromptEncoder) -> None:
    row = {"text": "<rendered>", "messages": [user("Hi"), assistant("a")]}
    (refused,) = read(tmp_path, prompts, row)
    assert isinstance(refused, Refusal) and "name one: --column text or --column messages" in refused.reason
    (sample,) = read_samples(find_sources([str(tmp_path)], MESSAGES), prompts)
    assert isinstance(sample, Sample) and "rendered" not in prompts.tokenizer.decode(sample.encoded.ids.tolist())


def shown(items: list[Sample | Refusal], prompts: PromptEncoder, **more: Any) -> str:
    terminal = more.pop("terminal", False)
    console = Console(
        file=io.StringIO(), width=40, force_terminal=terminal, color_system="standard" if terminal else None
    )
    show_samples(items, prompts.tokenizer, console, **more)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_dry_run_colors_the_tokens_with_loss(
    tmp_path: Path, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    (sample,) = read(tmp_path, prompts, {"messages": [user("Hi é"), assistant("Hellö \U0001f9ff\nyou")]})
    assert isinstance(sample, Sample)
    text = colored(sample, prompts.tokenizer)
    spans = [(str(span.style).removesuffix(f" {SPECIAL}"), text.plain[span.start : span.end]) for span in text.spans]
    assert len(spans) == len(sample.encoded.ids)  # every token is seen, those of a part of a character too
    assert all(one != other for (one, _), (other, _) in pairwise(spans))
    green = "".join(piece for style, piece in spans if style in TRAINED)
    assert r"Hell\xc3ö" in green and "↵\n" in green and "Hi" not in green and r"\xf0" in green
    assert "\x1b[30;42m" in shown([sample], prompts, shown=1, terminal=True)


def test_the_dry_run_without_color_has_marks(
    tmp_path: Path, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample,) = read(tmp_path, prompts, {"messages": [user("Hi there"), assistant("Hello you")]})
    assert isinstance(sample, Sample)
    mark = marked(sample, prompts.tokenizer).plain
    assert mark.replace("⟦", "").replace("⟧", "").replace("┊", "") == prompts.tokenizer.decode(
        sample.encoded.ids.tolist()
    )
    begin, end = mark.index("⟦"), mark.index("⟧")
    assert mark[begin + 1 : end].replace("┊", "") == trained(sample, prompts) and end == len(mark) - 1
    assert mark[begin:end].count("┊") == sample.encoded.targets - 1
    assert mark in shown([sample], prompts, shown=1)
    monkeypatch.setenv("NO_COLOR", "1")
    output = shown([sample], prompts, shown=1, terminal=True)
    assert mark in output and "[30;42m" not in output


def test_the_dry_run_lists_ids(tmp_path: Path, prompts: PromptEncoder) -> None:
    (sample,) = read(tmp_path, prompts, {"messages": [user("Hi"), assistant("Hello")]})
    assert isinstance(sample, Sample) and sample.encoded.mask is not None
    lines = [line.split(maxsplit=1) for line in listed(sample, prompts.tokenizer).plain.splitlines()]
    assert [int(number) for number, _ in lines] == sample.encoded.ids.tolist()
    assert [rest.startswith("+") for _, rest in lines] == (sample.encoded.mask == 1).tolist()
    assert listed(sample, prompts.tokenizer).plain in shown([sample], prompts, shown=1, ids=True)


def test_the_dry_run_says_how_to_see_all_refusals(tmp_path: Path, prompts: PromptEncoder) -> None:
    items = read(tmp_path, prompts, {"messages": [user("Hi"), assistant("Hello")]}, *["{no json"] * 3)
    output = shown(items, prompts, shown=1, refused=2)
    assert "talks.jsonl:3: no JSON" in output and "talks.jsonl:4" not in output
    assert "... and 1 more refused; --dry-run 0 lists all" in output and "1 samples" in output
    output = shown(items, prompts, shown=0, refused=None)
    assert "talks.jsonl:4: no JSON" in output and "more refused" not in output
