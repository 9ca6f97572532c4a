"""Coding agents against the server: first request, tool round trip, cancel, wrong key, a prompt that is too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.server.conftest import Served
from tests.server.responses_api import markup

from .agents import COMMAND, Agent, Outside, Run, start, stop
from .scripted import Script, counted_requests, long_server

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

QUESTION = "Which files are here?"
AGENTS = [
    Agent("Claude Code", "claude", "Bash", {"command": COMMAND, "description": "Echo"}, "Prompt is too long"),
    Agent("Codex", "codex", "exec_command", {"cmd": COMMAND}, tries=6),
    Agent("OpenCode", "opencode", "bash", {"command": COMMAND, "description": "Echo"}, asks=("registry.npmjs.org",)),
    Agent("DeepSeek Harness", "dsh", "bash", {"command": COMMAND, "description": "Echo"}),
    Agent("Qwen Code", "qwen", "run_shell_command", {"command": COMMAND}),
    Agent("Pi", "pi", "bash", {"command": COMMAND}, too_long=""),
    Agent("Cline CLI", "cline", "run_commands", {"commands": COMMAND}, asks=("data.cline.bot",)),
    Agent("Continue CLI", "cn", "Bash", {"command": COMMAND}),
]

Start = Callable[[Served], Run]


@pytest.fixture(params=AGENTS, ids=lambda agent: agent.program)
def agent(request: pytest.FixtureRequest) -> Agent:
    return request.param


@pytest.fixture
def outside() -> Iterator[Outside]:
    with Outside() as proxy:
        yield proxy


@pytest.fixture
def begin(agent: Agent, outside: Outside, tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin_at(served: Served) -> Run:
        runs.append(start(agent, served.url, tmp_path, outside))
        return runs[-1]

    yield begin_at
    for run in runs:
        stop(run)


def asked(served: Served) -> list[str]:
    """Prompts with the question."""
    prompts = [served.engine.llm.tokenizer.decode(ids) for ids in served.model.prompts]
    return [prompt for prompt in prompts if QUESTION in prompt]


def test_a_tool_round_trip(agent: Agent, begin: Start, outside: Outside, folder: Path) -> None:
    """Nothing but the server is asked for anything."""
    wrote = "I look.</think>Looking.\n\n" + markup(agent.tool, **agent.arguments)
    with long_server(folder) as served:
        rules = {"dsv4-42": "I saw it.</think>It printed forty-two.", QUESTION: wrote}
        served.model.reply = Script(served.model, rules)
        output = begin(served).finish()
        assert "It printed forty-two." in output, output
        prompts = asked(served)
    assert outside.hosts <= set(agent.asks), outside.asked
    last = prompts[-1]
    assert "dsv4-42" in last.split(wrote)[1], output  # the call is in the prompt as the model wrote it
    assert any(last.startswith(before + wrote) for before in prompts[:-1])


def test_a_cancelled_answer_is_no_longer_computed(agent: Agent, begin: Start, folder: Path) -> None:
    with long_server(folder) as served:
        served.model.reply = "</think>" + "and so on " * 5000
        served.model.seconds_per_step = 0.02
        run = begin(served)
        deadline = time.monotonic() + 120
        while served.model.num_sampled < 30:
            assert run.process.poll() is None and time.monotonic() < deadline, run.finish(1)
            time.sleep(0.01)
        run.cancel()
        with suppress(AssertionError):
            served.wait_until_idle(60)
        if run.process.poll() is None and served.engine.num_running:
            # Its connections are open: one that is interrupted before its turn has begun may go on (OpenCode).
            run.end()
        served.wait_until_idle(60)
        run.finish(60)


def test_a_wrong_key_is_said_and_not_tried_again_and_again(agent: Agent, begin: Start, folder: Path) -> None:
    with counted_requests() as requests, long_server(folder, api_keys=["sk-right"]) as served:
        output = begin(served).finish()
    assert "401" in output or "Authentication Fails" in output or "api key" in output.lower(), output
    assert 1 <= requests.posts(401) <= agent.tries, requests.seen


def test_too_long_a_prompt_is_recognized(agent: Agent, begin: Start, folder: Path) -> None:
    with counted_requests() as requests, long_server(folder, max_model_len=1024) as served:
        output = begin(served).finish()
    assert agent.too_long.lower() in output.lower(), output
    assert 1 <= requests.posts(400) <= 8, requests.seen
