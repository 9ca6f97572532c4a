"""JavaScript SDKs: chat, streams, tools, forced tools, structured output, thinking over several turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.responses_api import CALL, markup

from .javascript import need, run_module
from .pages import section_blocks
from .scripted import Script

pytestmark = [pytest.mark.clients, pytest.mark.timeout(400)]


@dataclass(frozen=True)
class JavaScriptClient:
    """`heading`: of its configuration; `program`: in tests/clients/node; `package`: that it needs.

    `reasoning`: True if it shows the model's thinking. `schema`: True if it sends the schema of structured output in a
    field; otherwise it asks for any JSON, and describes the schema in the prompt.
    """

    heading: str
    program: str
    package: str
    reasoning: bool = True
    schema: bool = True

    def __str__(self) -> str:
        return f"{self.heading}-{self.program.removesuffix('.mjs')}"


CLIENTS = [
    JavaScriptClient("openai-node", "openai_chat.mjs", "openai"),
    JavaScriptClient("openai-node", "openai_responses.mjs", "openai"),
    JavaScriptClient("@anthropic-ai/sdk", "anthropic_sdk.mjs", "@anthropic-ai/sdk"),
    JavaScriptClient("Vercel AI SDK: deepseek", "ai_sdk.mjs", "@ai-sdk/deepseek", schema=False),
    JavaScriptClient("Vercel AI SDK: openai-compatible", "ai_sdk.mjs", "@ai-sdk/openai-compatible"),
    JavaScriptClient("Vercel AI SDK: openai.chat", "ai_sdk.mjs", "@ai-sdk/openai", reasoning=False),
    JavaScriptClient("Vercel AI SDK: openai (Responses)", "ai_sdk.mjs", "@ai-sdk/openai", reasoning=False),
    JavaScriptClient("Vercel AI SDK: anthropic", "ai_sdk.mjs", "@ai-sdk/anthropic"),
]
GREETING = "I think.</think>Hello there."

Run = Callable[[str], Any]


@pytest.fixture(params=CLIENTS, ids=str)
def client(request: pytest.FixtureRequest) -> JavaScriptClient:
    need(request.param.package)
    return request.param


@pytest.fixture
def run(client: JavaScriptClient, server: Served) -> Run:
    """run(scenario) -> what the client's program gave."""
    (block,) = section_blocks(client.heading, server.url)
    return lambda scenario: run_module(block.text, client.program, scenario)


@pytest.mark.parametrize("scenario", ["chat", "stream"])
def test_text_thinking_and_usage(run: Run, server: Served, client: JavaScriptClient, scenario: str) -> None:
    server.model.reply = GREETING
    found = run(scenario)
    assert found["text"] == "Hello there." and found["tokens"] > 20
    assert (found.get("reasoning") or "") == ("I think." if client.reasoning else "")


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
    """The model would call another tool."""
    server.model.reply = "I think.</think>\n\n" + markup("prank", color="red")
    assert run("forced") == [{"name": "paint", "color": "red"}] * 2


def test_structured_output_is_enforced(run: Run, server: Served, client: JavaScriptClient) -> None:
    server.model.reply = GREETING if client.schema else 'I think.</think>{"color": "red"}'
    found = run("structured")
    assert found and all(value["color"] in ("red", "blue") for value in found)


def test_an_unknown_model_is_an_error_that_names_the_known_ones(run: Run) -> None:
    found = run("refused")
    assert found["status"] == 400 and "deepseek-flash" in found["message"]
