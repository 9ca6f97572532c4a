"""Thinking and effort, each documented value of each protocol, up to the prompt that the model reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from dsv4.engine import LLM
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer
from tests.server.conftest import ScriptedModel, Served, serving
from tests.server.scripted_model import VOCAB

ABSOLUTE, BEYOND = "Reasoning Effort: Absolute maximum", "Beyond maximum"
USER = [{"role": "user", "content": "x"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
OFF = "off"
LADDERS = ("preview", "0731", "scalar")
EFFORTS: dict[str | None, tuple[str, str, str]] = {  # of the request -> what each ladder makes of it
    None: ("", ABSOLUTE, "75"),
    "minimal": ("", "", "50"),
    "low": ("", "", "50"),
    "medium": ("", ABSOLUTE, "75"),
    "high": ("", ABSOLUTE, "75"),
    "xhigh": (ABSOLUTE, ABSOLUTE, "75"),
    "max": (ABSOLUTE, BEYOND, "100"),
    "ultra": (ABSOLUTE, BEYOND, "100"),
    "none": (OFF, OFF, OFF),
}


@pytest.fixture(scope="module", params=LADDERS)
def ladder(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def efforts(ladder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), VOCAB), folder)
    write_effort_ladder(folder, ladder)  # type: ignore[arg-type]
    model = ScriptedModel(folder)
    with serving(LLM(model, folder=folder), model) as served:
        yield served


def instruction(served: Served, path: str, body: dict[str, Any]) -> str:
    """The effort instruction in the prompt of a request: empty for none, OFF without thinking."""
    said = {"input": "x"} if "responses" in path else {"messages": USER}
    answer = served.http().post(path, json={"model": "tiny", "max_tokens": 9, **said, **body})
    assert answer.status_code == 200, answer.text
    prompt = served.engine.llm.tokenizer.decode(served.model.prompts[-1])  # type: ignore[union-attr]
    if prompt.endswith("<｜Assistant｜></think>"):
        assert "Reasoning Effort" not in prompt and BEYOND not in prompt
        return OFF
    assert prompt.endswith("<｜Assistant｜><think>")
    if number := re.match(r"<｜begin▁of▁sentence｜>Reasoning Effort: (\d+) \(range 1-100", prompt):
        assert prompt.count("Reasoning Effort") == 1
        return number[1]
    found = [text for text in ("Absolute maximum", BEYOND) if text in prompt]
    assert len(found) <= 1
    return {(): "", ("Absolute maximum",): ABSOLUTE, (BEYOND,): BEYOND}[tuple(found)]


@pytest.mark.parametrize("effort", EFFORTS, ids=str)
@pytest.mark.parametrize("path", [CHAT, "/chat/completions", "/beta/chat/completions", "/beta/v1/chat/completions"])
def test_every_effort_of_chat_completions(efforts: Served, ladder: str, path: str, effort: str | None) -> None:
    expected = EFFORTS[effort][LADDERS.index(ladder)]
    assert instruction(efforts, path, {"reasoning_effort": effort}) == expected
    if effort is not None:
        assert instruction(efforts, path, {"chat_template_kwargs": {"reasoning_effort": effort}}) == expected
    off = {"thinking": {"type": "disabled"}}
    assert instruction(efforts, path, {"reasoning_effort": effort} | off) == OFF


@pytest.mark.parametrize("effort", EFFORTS, ids=str)
@pytest.mark.parametrize("path", [RESPONSES, "/beta/v1/responses"])
def test_every_effort_of_responses(efforts: Served, ladder: str, path: str, effort: str | None) -> None:
    expected = EFFORTS[effort][LADDERS.index(ladder)]
    assert instruction(efforts, path, {"reasoning": {"effort": effort}}) == expected


@pytest.mark.parametrize("effort", ["low", "medium", "high", "xhigh", "max", None])
@pytest.mark.parametrize("path", ["/anthropic/v1/messages", MESSAGES])
def test_every_effort_of_messages(efforts: Served, ladder: str, path: str, effort: str | None) -> None:
    expected = EFFORTS[effort][LADDERS.index(ladder)]
    config = {"output_config": {"effort": effort}}
    for thinking in ({"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}, {"type": "enabled"}, None):
        body = config | ({} if thinking is None else {"thinking": thinking})
        assert instruction(efforts, path, body) == expected, thinking
    assert instruction(efforts, path, config | {"thinking": {"type": "disabled"}}) == OFF


@pytest.mark.parametrize("ladder", ["scalar"], indirect=True)
def test_a_budget_between_the_levels_is_asked_by_the_system_text(efforts: Served, ladder: str) -> None:
    """No API has a field for it."""
    line = "Reasoning Effort: 7 (range 1-100, the higher the value, the more thorough the reasoning)"
    system = [{"role": "system", "content": line}]
    assert instruction(efforts, CHAT, {"messages": system + USER, "reasoning_effort": "max"}) == "7"
    assert instruction(efforts, MESSAGES, {"system": f"{line}\n\nBe brief."}) == "7"
    assert instruction(efforts, RESPONSES, {"instructions": line}) == "7"


@pytest.mark.parametrize(
    ("body", "thinks"),
    [
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, True),
        ({"thinking": None}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"thinking": False}, "thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": True}, "thinking": {"type": "disabled"}}, False),
        ({"chat_template_kwargs": {"thinking": False, "reasoning_effort": "max"}}, False),
    ],
)
def test_every_switch_of_thinking_in_chat(efforts: Served, body: dict[str, Any], thinks: bool) -> None:
    for path in (CHAT, "/beta/chat/completions"):
        assert (instruction(efforts, path, body) != OFF) is thinks


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (CHAT, {"reasoning_effort": "most"}, "reasoning_effort"),
        (CHAT, {"reasoning_effort": 3}, "reasoning_effort"),
        (CHAT, {"thinking": {}}, "thinking"),
        (CHAT, {"thinking": True}, "thinking"),
        (CHAT, {"thinking": {"type": "sometimes"}}, "thinking.type"),
        (MESSAGES, {"thinking": {"type": "sometimes"}}, "thinking.type"),
        (MESSAGES, {"output_config": {"effort": "most"}}, "output_config.effort"),
        (RESPONSES, {"reasoning": {"effort": "most"}}, "reasoning.effort"),
    ],
)
def test_other_values_are_refused_with_their_place(efforts: Served, path: str, body: dict, place: str) -> None:
    said = {"input": "x"} if "responses" in path else {"messages": USER}
    answer = efforts.http().post(path, json={"model": "tiny", "max_tokens": 9, **said, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == place and place in error["message"]
