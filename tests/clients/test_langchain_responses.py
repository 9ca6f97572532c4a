"""LangChain over the Responses API; skipped without langchain-openai."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.server.responses_api import markup

langchain_openai = pytest.importorskip("langchain_openai")


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def chat(server, **options: Any) -> Any:
    return langchain_openai.ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key="x", use_responses_api=True, max_retries=0, **options
    )


def test_a_tools_loop_continued_by_id(server) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def weather(city: str) -> str:
        """Weather of a city."""
        return f"sun in {city}"

    model = chat(server, use_previous_response_id=True).bind_tools([weather])
    wrote = "I look it up.</think>\n\n" + markup("weather", city="Oslo")
    server.model.reply = wrote
    question = HumanMessage("Weather in Oslo?")
    first = model.invoke([question])
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    begun = server.model.prompts[-1] + server.model.tokenizer.encode(wrote)
    server.model.reply = "sunny</think>Sunny."
    second = model.invoke([question, first, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])])
    assert second.text == "Sunny." and server.model.prompts[-1][: len(begun)] == begun
    assert second.usage_metadata["output_token_details"]["reasoning"] > 0


def test_streamed_text_and_structured_output(server) -> None:
    server.model.reply = "I think.</think>Hello there."
    assert "".join(chunk.text for chunk in chat(server).stream("Hi")) == "Hello there."
    for method in ("json_schema", "function_calling"):
        found = chat(server).with_structured_output(Color, method=method, strict=True).invoke("A color")
        assert isinstance(found, Color)
