"""Haystack's chat generator and agent."""

from typing import Annotated, Literal

from configuration import generator
from haystack.components.agents import Agent
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


@tool
def weather(city: Annotated[str, "the city"]) -> str:
    """Weather of a city"""
    return f"sun in {city}"


@tool
def paint(color: Annotated[Literal["red", "blue"], "the color"]) -> str:
    """Paints"""
    return color


def _ask(messages, **options):
    return generator.run(messages, **options)["replies"][0]


def _shown(reply, text):
    reasoning = reply.reasoning.reasoning_text if reply.reasoning else ""
    return {"text": text, "reasoning": reasoning, "tokens": reply.meta["usage"]["total_tokens"]}


def chat():
    reply = _ask([ChatMessage.from_user("Hello")])
    return _shown(reply, reply.text)


def stream():
    texts = []
    reply = _ask(
        [ChatMessage.from_user("Hello")],
        streaming_callback=lambda chunk: texts.append(chunk.content),
        generation_kwargs={"stream_options": {"include_usage": True}},
    )
    return _shown(reply, "".join(texts))


def turns():
    messages = [ChatMessage.from_user("Hello")]
    messages += [_ask(messages), ChatMessage.from_user("And you?")]
    return _ask(messages).text


def tools():
    agent = Agent(chat_generator=generator, tools=[weather])
    first = agent.run(messages=[ChatMessage.from_user("Weather in Oslo?")])["messages"]
    later = agent.run(messages=[*first, ChatMessage.from_user("And tomorrow?")])["messages"]
    return [first[-1].text, later[-1].text]


def streamed_tools():
    agent = Agent(chat_generator=generator, tools=[weather], streaming_callback=lambda chunk: None)
    return agent.run(messages=[ChatMessage.from_user("Weather in Oslo?")])["messages"][-1].text


def forced():
    found = []
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        reply = _ask([ChatMessage.from_user("A color")], tools=[paint], generation_kwargs={"tool_choice": choice})
        found += [call.arguments for call in reply.tool_calls]
    return found


def structured():
    reply = _ask([ChatMessage.from_user("A color")], generation_kwargs={"response_format": Color})
    return [Color.model_validate_json(reply.text).model_dump()]


def refused():
    try:
        _ask([ChatMessage.from_user("Hi")], generation_kwargs={"model": "none"})
    except Exception as error:
        return str(error)
