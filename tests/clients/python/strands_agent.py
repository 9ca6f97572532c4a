"""Strands Agents."""

from typing import Literal

from configuration import model
from pydantic import BaseModel
from strands import Agent, tool


class Color(BaseModel, extra="forbid"):
    """A color"""

    color: Literal["red", "blue"]


@tool
def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _agent(**options):
    return Agent(model, callback_handler=None, **options)


def _text(result):
    return "".join(block.get("text", "") for block in result.message["content"])


def stream():
    """Its agents always stream."""
    result = _agent()("Hello")
    blocks = [block["reasoningContent"] for block in result.message["content"] if "reasoningContent" in block]
    thoughts = [block["reasoningText"]["text"] for block in blocks]
    tokens = result.metrics.accumulated_usage["totalTokens"]
    return {"text": _text(result), "reasoning": "".join(thoughts), "tokens": tokens}


def turns():
    agent = _agent()
    agent("Hello")
    return _text(agent("And you?"))


def tools():
    agent = _agent(tools=[weather])
    return [_text(agent(question)) for question in ("Weather in Oslo?", "And tomorrow?")]


def structured_tools():
    return [_agent()("A color", structured_output_model=Color).structured_output.model_dump()]


def refused():
    try:
        Agent(type(model)(client_args=model.client_args, model_id="none"), callback_handler=None)("Hi")
    except Exception as error:
        return str(error)
