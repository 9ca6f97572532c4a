"""OpenAI Agents SDK."""

import asyncio
from typing import Literal

from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
from configuration import model
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

set_tracing_disabled(True)


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


@function_tool
def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


painted = []
loop = asyncio.new_event_loop()  # the client's connections live on one loop


@function_tool
def paint(color: Literal["red", "blue"]) -> str:
    """Paints"""
    painted.append({"color": color})
    return "done"


def _run(agent, question):
    return loop.run_until_complete(Runner.run(agent, question))


def _agent(**options):
    return Agent("assistant", model=model, **options)


def _reasoning(result):
    items = [item for response in result.raw_responses for item in response.output if item.type == "reasoning"]
    return "".join(part.text for item in items for part in item.content or item.summary)


def _shown(result, text):
    tokens = result.context_wrapper.usage.total_tokens
    return {"text": text, "reasoning": _reasoning(result), "tokens": tokens}


def chat():
    result = _run(_agent(), "Hello")
    return _shown(result, result.final_output)


async def _streamed(agent, question):
    result, text = Runner.run_streamed(agent, question), ""
    async for event in result.stream_events():
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
            text += event.data.delta
    return result, text


def stream():
    return _shown(
        *loop.run_until_complete(_streamed(_agent(model_settings=ModelSettings(include_usage=True)), "Hello"))
    )


def turns():
    first = _run(_agent(), "Hello")
    return _run(_agent(), [*first.to_input_list(), {"role": "user", "content": "And you?"}]).final_output


def tools():
    agent = _agent(tools=[weather])
    first = _run(agent, "Weather in Oslo?")
    later = [*first.to_input_list(), {"role": "user", "content": "And tomorrow?"}]
    return [first.final_output, _run(agent, later).final_output]


def streamed_tools():
    result, _ = loop.run_until_complete(_streamed(_agent(tools=[weather]), "Weather in Oslo?"))
    return result.final_output


def forced():
    """An agent that ends with its tool's first result."""
    painted.clear()
    for choice in ("required", "paint"):
        settings = ModelSettings(tool_choice=choice)
        _run(_agent(tools=[paint], model_settings=settings, tool_use_behavior="stop_on_first_tool"), "A color")
    return painted


def structured():
    return [_run(_agent(output_type=Color), "A color").final_output.model_dump()]


def refused():
    try:
        _run(Agent("assistant", model=type(model)("none", model._client)), "Hi")
    except Exception as error:
        return str(error)
