"""Python clients: chat, streams, tools, forced tools, structured output, thinking over several turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.responses_api import CALL, markup

from .pages import PAGE
from .programs import Interpreter, PythonClient, need
from .scripted import OfferedCall, Script
from .table import table

pytestmark = pytest.mark.timeout(400)

CLIENTS = [
    PythonClient("openai-python", "openai_chat.py", "openai"),
    PythonClient("openai-python", "openai_responses.py", "openai"),
    PythonClient("anthropic-sdk-python", "anthropic_sdk.py", "anthropic"),
    PythonClient("LangChain: deepseek", "langchain.py", "langchain-deepseek"),
    PythonClient("LangChain: openai", "langchain.py", "langchain-openai", reasoning=False),
    PythonClient("LangChain: openai (Responses)", "langchain.py", "langchain-openai", reasoning=False),
    PythonClient("LangChain: anthropic", "langchain.py", "langchain-anthropic"),
    PythonClient("LiteLLM: deepseek", "litellm_completion.py", "litellm"),
    PythonClient("LiteLLM: openai", "litellm_completion.py", "litellm"),
    PythonClient("LiteLLM: anthropic", "litellm_completion.py", "litellm", enforced=False),
    PythonClient("pydantic-ai: DeepSeek", "pydantic_ai_agent.py", "pydantic-ai-slim", "frameworks"),
    PythonClient("pydantic-ai: Responses", "pydantic_ai_agent.py", "pydantic-ai-slim", "frameworks"),
    PythonClient("pydantic-ai: Anthropic", "pydantic_ai_agent.py", "pydantic-ai-slim", "frameworks"),
    PythonClient("OpenAI Agents SDK", "openai_agents.py", "openai-agents", "frameworks"),
    PythonClient("OpenAI Agents SDK: Responses", "openai_agents.py", "openai-agents", "frameworks"),
    PythonClient("smolagents", "smolagents_agent.py", "smolagents", "frameworks", reasoning=False),
    PythonClient("Haystack", "haystack_generator.py", "haystack-ai", "frameworks", reasoning=False),
    PythonClient("DSPy", "dspy_modules.py", "dspy", "frameworks"),
    PythonClient("AutoGen", "autogen_client.py", "autogen-ext", "frameworks"),
    PythonClient(
        "Agent Framework", "agent_framework_agent.py", "agent-framework-openai", "frameworks", reasoning=False
    ),
    PythonClient("Agent Framework: Responses", "agent_framework_agent.py", "agent-framework-openai", "frameworks"),
    PythonClient("Agno", "agno_agent.py", "agno", "frameworks"),
    PythonClient("outlines", "outlines_model.py", "outlines", "frameworks"),
    PythonClient("LlamaIndex", "llama_index_llm.py", "llama-index-llms-openai-like", "older"),
    PythonClient("Strands Agents", "strands_agent.py", "strands-agents", "older"),
    PythonClient("mirascope", "mirascope_call.py", "mirascope", "older", reasoning=False),
    PythonClient("instructor", "instructor_client.py", "instructor", "instructor"),
    PythonClient("CrewAI", "crewai_llm.py", "crewai", "crewai"),
    PythonClient("Semantic Kernel", "semantic_kernel_chat.py", "semantic-kernel", "semantic_kernel", reasoning=False),
]
GREETING = "I think.</think>Hello there."
COLOR = '{"color": "red"}'

Run = Callable[[PythonClient, str], Any]


def cases(*scenarios: str) -> pytest.MarkDecorator:
    """Every client with each of these scenarios that its program has; those of other environments are marked."""
    return pytest.mark.parametrize(
        ("client", "scenario"),
        [
            pytest.param(
                client,
                scenario,
                marks=[pytest.mark.clients] if client.environment else [],
                id=f"{client.heading}-{client.program.removesuffix('.py')}-{scenario}",
            )
            for client in CLIENTS
            for scenario in scenarios
            if scenario in client.scenarios
        ],
    )


@pytest.fixture(scope="module")
def interpreters() -> Iterator[dict[str, Interpreter]]:
    running = {client.environment: Interpreter(client.environment, client.python) for client in CLIENTS}
    yield running
    for interpreter in running.values():
        interpreter.close()


@pytest.fixture
def run(interpreters: dict[str, Interpreter], server: Served) -> Run:
    """run(client, scenario) -> what the scenario gave."""

    def run_scenario(client: PythonClient, scenario: str) -> Any:
        need(client)
        return interpreters[client.environment].run(client, scenario, server.url)

    return run_scenario


def prompts(server: Served) -> list[str]:
    return [server.engine.llm.tokenizer.decode(ids) for ids in server.model.prompts]


@cases("chat", "stream")
def test_text_thinking_and_usage(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    server.model.reply = GREETING
    found = run(client, scenario)
    assert found["text"] == "Hello there." and found["tokens"] > 20
    assert (found["reasoning"] or "") == ("I think." if client.reasoning else "")


@cases("text")
def test_text(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    server.model.reply = GREETING
    assert run(client, scenario) == "Hello there."


@cases("turns")
def test_thinking_of_earlier_turns_is_left_out_without_tools(
    client: PythonClient, scenario: str, run: Run, server: Served
) -> None:
    server.model.reply = Script(server.model, {"And you?": "Later.</think>Fine.", "Hello": GREETING})
    assert run(client, scenario) == "Fine."
    last = prompts(server)[-1]
    assert "Hello there." in last and "I think." not in last


@cases("tools")
def test_a_tool_loop_and_another_turn(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    """Each prompt begins with the tokens of the one before and of its answer, even if the client drops the thinking."""
    answer, later = "It is sunny.</think>Sunny.", "Same as today.</think>Sunny again."
    server.model.reply = Script(server.model, {"And tomorrow?": later, "<tool_result>": answer, "Oslo": CALL})
    assert run(client, scenario) == ["Sunny.", "Sunny again."]
    first, second, third = prompts(server)
    assert "<tool_result>sun in Oslo</tool_result>" in second and "Sunny." in third
    assert second.startswith(first + CALL) and third.startswith(second + answer)


@cases("streamed_tools", "runner", "runner_without_thread")
def test_a_tool_loop(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    server.model.reply = Script(server.model, {"sun in Oslo": "I see.</think>Sunny.", "Oslo": CALL})
    assert run(client, scenario) == "Sunny."


@cases("plugin")
def test_a_tool_loop_of_a_plugin(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    call = "I look it up.</think>\n\n" + markup("Weather-weather", city="Oslo")
    server.model.reply = Script(server.model, {"sun in Oslo": "I see.</think>Sunny.", "Oslo": call})
    assert run(client, scenario) == "Sunny."
    assert "sun in Oslo" in prompts(server)[-1]


@cases("final_answer")
def test_a_tool_loop_that_a_tool_ends(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    end = "I see.</think>\n\n" + markup("final_answer", answer="Sunny.")
    server.model.reply = Script(server.model, {"sun in Oslo": end, "Oslo": CALL})
    assert run(client, scenario) == "Sunny."


@cases("forced", "structured_tools")
def test_forced_tools_while_thinking(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    server.model.reply = OfferedCall(server.model, color="red")
    found = run(client, scenario)
    assert found and all(value == {"color": "red"} for value in found)


@cases("structured")
def test_structured_output(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    """Enforced: the model would say something else."""
    server.model.reply = GREETING if client.enforced else OfferedCall(server.model, color="red")
    found = run(client, scenario)
    assert found and all(value["color"] in ("red", "blue") for value in found)


@cases("json_mode")
def test_json_mode(client: PythonClient, scenario: str, run: Run, server: Served) -> None:
    server.model.reply = f"I think.</think>{COLOR}"
    assert run(client, scenario) == {"color": "red"}


@cases("refused")
def test_an_unknown_model_is_an_error_that_names_the_known_ones(client: PythonClient, scenario: str, run: Run) -> None:
    assert "deepseek-flash" in run(client, scenario)


def test_the_page_has_a_row_per_client() -> None:
    assert table(CLIENTS) in PAGE.read_text(encoding="utf-8"), table(CLIENTS)


@cases("too_long")
def test_too_long_a_prompt_is_recognized(client: PythonClient, scenario: str, run: Run) -> None:
    assert "maximum context length" in run(client, scenario)
