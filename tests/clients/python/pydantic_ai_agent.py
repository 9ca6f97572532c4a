"""pydantic-ai's agents."""

from typing import Literal

from configuration import model
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ThinkingPart


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _shown(result, text):
    """The thinking of Responses is in a part's details: in full there, where `content` has its summary."""
    parts = [part for message in result.all_messages() for part in message.parts if isinstance(part, ThinkingPart)]
    thoughts = [part.content or "".join((part.provider_details or {}).get("raw_content", [])) for part in parts]
    return {"text": text, "reasoning": "".join(thoughts), "tokens": result.usage.total_tokens}


def chat():
    result = Agent(model).run_sync("Hello")
    return _shown(result, result.output)


def stream():
    result = Agent(model).run_stream_sync("Hello")
    return _shown(result, "".join(result.stream_text(delta=True)))


def turns():
    agent = Agent(model)
    first = agent.run_sync("Hello")
    return agent.run_sync("And you?", message_history=first.all_messages()).output


def tools():
    agent = Agent(model, tools=[weather])
    first = agent.run_sync("Weather in Oslo?")
    return [first.output, agent.run_sync("And tomorrow?", message_history=first.all_messages()).output]


def streamed_tools():
    result = Agent(model, tools=[weather]).run_stream_sync("Weather in Oslo?")
    return "".join(result.stream_text(delta=True))


def structured():
    return [Agent(model, output_type=NativeOutput(Color)).run_sync("A color").output.model_dump()]


def structured_tools():
    """Tool choice "required"."""
    agents = (Agent(model, output_type=Color), Agent(model, output_type=ToolOutput(Color, strict=True)))
    return [agent.run_sync("A color").output.model_dump() for agent in agents]


def json_mode():
    return Agent(model, output_type=PromptedOutput(Color)).run_sync("A color as JSON").output.model_dump()


def refused():
    try:
        Agent(type(model)("none", provider=model._provider)).run_sync("Hi")
    except ModelHTTPError as error:
        return str(error)
