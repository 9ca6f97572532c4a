"""JavaScript SDKs: chat, streams, tools, forced tools, structured output, thinking over several turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.responses_api import CALL

from .javascript import need, run_module
from .pages import section_blocks
from .scripted import Script

pytestmark = [pytest.mark.clients, pytest.mark.timeout(400)]

# Heading of docs/clients.md and program -> package.
CLIENTS = {
    ("openai-node", "openai_chat.mjs"): "openai",
    ("openai-node", "openai_responses.mjs"): "openai",
    ("@anthropic-ai/sdk", "anthropic_sdk.mjs"): "@anthropic-ai/sdk",
    ("Vercel AI SDK: deepseek", "ai_sdk.mjs"): "@ai-sdk/deepseek",
    ("Vercel AI SDK: openai-compatible", "ai_sdk.mjs"): "@ai-sdk/openai-compatible",
    ("Vercel AI SDK: openai.chat", "ai_sdk.mjs"): "@ai-sdk/openai",
    ("Vercel AI SDK: openai (Responses)", "ai_sdk.mjs"): "@ai-sdk/openai",
    ("Vercel AI SDK: anthropic", "ai_sdk.mjs"): "@ai-sdk/anthropic",
}
# A client that knows only OpenAI's own fields of a chat.
HIDES_REASONING = "Vercel AI SDK: openai.chat"
GREETING = "I think.</think>Hello there."

Run = Callable[[str], Any]


@pytest.fixture(params=CLIENTS, ids=lambda client: f"{client[0]}-{client[1].removesuffix('.mjs')}")
def client(request: pytest.FixtureRequest) -> tuple[str, str]:
    need(CLIENTS[request.param])
    return request.param


@pytest.fixture
def run(client: tuple[str, str], server: Served) -> Run:
    """run(scenario) -> what the client's program gave."""
    heading, program = client
    (block,) = section_blocks(heading, server.url)
    return lambda scenario: run_module(block.text, program, scenario)


@pytest.mark.parametrize("scenario", ["chat", "stream"])
def test_text_thinking_and_usage(run: Run, server: Served, client: tuple[str, str], scenario: str) -> None:
    server.model.reply = GREETING
    found = run(scenario)
    assert found["text"] == "Hello there." and found["tokens"] > 20
    if client[0] != HIDES_REASONING:
        assert found["reasoning"] == "I think."


def test_a_tool_loop_and_another_turn_begin_with_the_same_tokens(run: Run, server: Served) -> None:
    answer, later = "It is sunny.</think>Sunny.", "Same as today.</think>Sunny again."
    server.model.reply = Script(server.model, {"And tomorrow?": later, "<tool_result>": answer, "Oslo": CALL})
    assert run("tools") == {"text": "Sunny.", "later": "Sunny again."}
    prompts = [server.engine.llm.tokenizer.decode(ids) for ids in server.model.prompts]
    first, second, third = prompts
    assert second.startswith(first + CALL) and "<tool_result>sun in Oslo</tool_result>" in second
    assert third.startswith(second + answer)


def test_a_streamed_tool_loop(run: Run, server: Served) -> None:
    server.model.reply = Script(server.model, {"sun in Oslo": "I see.</think>Sunny.", "Oslo": CALL})
    assert run("streamed_tools") == {"text": "Sunny."}


def test_forced_tools_while_thinking(run: Run, server: Served) -> None:
    server.model.reply = GREETING
    given = run("forced")
    assert len(given) == 2 and all(arguments["color"] in ("red", "blue") for arguments in given)


def test_structured_output_is_enforced(run: Run, server: Served) -> None:
    server.model.reply = GREETING
    assert run("structured")["color"] in ("red", "blue")


def test_an_unknown_model_is_an_error_that_names_the_known_ones(run: Run) -> None:
    found = run("refused")
    assert found["status"] == 400 and "deepseek-flash" in found["message"]
