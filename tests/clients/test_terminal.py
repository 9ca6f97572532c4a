"""llm and aider: Python programs of the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.conftest import Served
from tests.server.responses_api import CALL

from .agents import Agent, Run, start, stop
from .scripted import Script, long_server

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

LLM = Agent("llm", "llm", "", {})
AIDER = Agent("aider", "aider", "", {})

Start = Callable[[Agent, Served], Run]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin_at(agent: Agent, served: Served) -> Run:
        runs.append(start(agent, served.url, tmp_path))
        return runs[-1]

    yield begin_at
    for run in runs:
        stop(run)


def test_llm_chats_calls_goes_on_and_keeps_to_a_schema(begin: Start, folder: Path) -> None:
    """The second last answer is a call of a tool that the request no longer has: text without markup."""
    with long_server(folder) as served:
        rules = {
            "A color": 'I think.</think>{"color": "red"}',
            "And tomorrow?": CALL,
            "sun in Oslo": "I see.</think>Sunny.",
            "Weather in Oslo?": CALL,
            "Hello": "I think.</think>Hello there.",
        }
        served.model.reply = Script(served.model, rules)
        output = begin(LLM, served).finish()
        prompts = [served.engine.llm.tokenizer.decode(ids) for ids in served.model.prompts]
    lines = [line for line in output.splitlines() if line.strip()]
    assert lines[0] == "Hello there." and "Sunny." in lines and "DSML" not in output, output
    assert 'weather({"city": "Oslo"})' in output and json.loads(lines[-1]) == {"color": "red"}, output
    assert len(prompts) == 5 and "sun in Oslo" in prompts[3], "the tool's result is part of the conversation"


def test_aider_edits_a_file(begin: Start, folder: Path, tmp_path: Path) -> None:
    with long_server(folder) as served:
        served.model.reply = "I think.</think>Here it is.\n\nhello.py\n```\nprint('hello')\n```\n"
        output = begin(AIDER, served).finish()
    assert (tmp_path / "work" / "hello.py").read_text() == "print('hello')\n", output
    assert "DSML" not in output


def test_aider_says_that_a_key_is_wrong(begin: Start, folder: Path, tmp_path: Path) -> None:
    with long_server(folder, api_keys=["sk-right"]) as served:
        output = begin(AIDER, served).finish()
    assert "Authentication" in output, output
