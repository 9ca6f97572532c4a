"""smolagents: its model alone, and an agent that calls tools."""

import json
from typing import Literal

from configuration import model
from pydantic import BaseModel
from smolagents import ToolCallingAgent, tool


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


@tool
def weather(city: str) -> str:
    """Weather of a city

    Args:
        city: the city
    """
    return f"sun in {city}"


@tool
def paint(color: str) -> str:
    """Paints

    Args:
        color: the color
    """
    return color


def _user(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def chat():
    answer = model.generate([_user("Hello")])
    return {"text": answer.content, "reasoning": "", "tokens": answer.token_usage.total_tokens}


def turns():
    messages = [_user("Hello")]
    messages += [model.generate(messages), _user("And you?")]
    return model.generate(messages).content


def stream():
    text, tokens = "", 0
    for delta in model.generate_stream([_user("Hello")]):
        text += delta.content or ""
        tokens = delta.token_usage.total_tokens if delta.token_usage else tokens
    return {"text": text, "reasoning": "", "tokens": tokens}


def forced():
    """Each step of an agent forces a call."""
    answer = model.generate([_user("A color")], tools_to_call_from=[paint])
    return [json.loads(call.function.arguments) for call in answer.tool_calls]


def final_answer():
    """Agents call a tool for the answer too."""
    return ToolCallingAgent([weather], model, verbosity_level=0, max_steps=4).run("Weather in Oslo?")


def structured():
    form = {
        "type": "json_schema",
        "json_schema": {"name": "color", "schema": Color.model_json_schema(), "strict": True},
    }
    return [Color.model_validate_json(model.generate([_user("A color")], response_format=form).content).model_dump()]


def refused():
    try:
        type(model)("none", api_base=str(model.client.base_url), api_key="unused").generate([_user("Hi")])
    except Exception as error:
        return str(error)
