"""mirascope."""

from typing import Literal

from configuration import model
from mirascope import llm
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


@llm.tool
def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _shown(response):
    return {
        "text": response.text(),
        "reasoning": "".join(thought.thought for thought in response.thoughts),
        "tokens": response.usage.total_tokens,
    }


def chat():
    return _shown(model.call("Hello"))


def stream():
    response = model.stream("Hello")
    response.finish()
    return _shown(response)


def turns():
    return model.call("Hello").resume("And you?").text()


def _loop(response):
    while response.tool_calls:
        response = response.resume(response.execute_tools())
    return response


def tools():
    first = _loop(model.call("Weather in Oslo?", tools=[weather]))
    return [first.text(), _loop(first.resume("And tomorrow?")).text()]


def streamed_tools():
    response = model.stream("Weather in Oslo?", tools=[weather])
    response.finish()
    while response.tool_calls:
        response = response.resume(response.execute_tools())
        response.finish()
    return response.text()


def structured():
    return [model.call("A color", format=llm.format(Color, mode="strict")).parse().model_dump()]


def structured_tools():
    return [model.call("A color", format=llm.format(Color, mode="tool")).parse().model_dump()]


def refused():
    try:
        llm.model(model.model_id.partition("/")[0] + "/none").call("Hi")
    except Exception as error:
        return str(error)
