"""Samples of fine-tuning: one per turn or per conversation, masks, refusals by line, the dry run's colors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsv4.config import nano_path
from dsv4.data.records import find_sources
from dsv4.post_training.sft_preview import TRAINED, colored, show_samples
from dsv4.post_training.sft_samples import Refusal, Sample, read_samples
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


def test_a_thinking_conversation_without_tools_is_a_sample_per_turn(tmp_path: Path, prompts: PromptEncoder) -> None:
    talk = {"messages": [user("Hi"), assistant("Hello", "greet"), user("2+2"), assistant("4", "two and two")]}
    first, second = read(tmp_path, prompts, talk)
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert (first.turn, second.turn) == (1, 3)
    assert "greet</think>Hello" in trained(first, prompts)
    assert "two and two</think>4" in trained(second, prompts)
    whole = prompts.tokenizer.decode(second.encoded.ids.tolist())
    assert "greet" not in whole and "Hello" in whole and "Hello" not in trained(second, prompts)


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


def test_the_dry_run_colors_the_tokens_with_loss(tmp_path: Path, prompts: PromptEncoder) -> None:
    talk = {"messages": [user("Hi é"), assistant("Hellö")]}
    items = read(tmp_path, prompts, talk, "{no json")
    console = Console(file=io.StringIO(), width=100)
    assert show_samples(items, prompts.tokenizer, console, shown=1) == (1, 1)
    output = console.file.getvalue().replace("\n", "")  # pyright: ignore[reportAttributeAccessIssue]
    assert "Hellö" in output and "talks.jsonl:2: no JSON" in output and "1 samples" in output
    assert isinstance(items[0], Sample)
    text = colored(items[0], prompts.tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED)
    assert "Hellö" in green and "Hi" not in green
