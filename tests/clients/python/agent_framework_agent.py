"""Microsoft Agent Framework."""

import asyncio
from typing import Literal

from agent_framework import Agent
from configuration import client
from pydantic import BaseModel

loop = asyncio.new_event_loop()  # the client's connections live on one loop
painted = []


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def paint(color: Literal["red", "blue"]) -> str:
    """Paints"""
    painted.append({"color": color})
    return "done"


def _run(agent, question, **options):
    return loop.run_until_complete(agent.run(question, **options))


def _shown(answer):
    contents = [content for message in answer.messages for content in message.contents]
    thoughts = [content.text or "" for content in contents if content.type == "text_reasoning"]
    return {
        "text": answer.text,
        "reasoning": "".join(thoughts),
        "tokens": answer.usage_details["total_token_count"],
    }


def chat():
    return _shown(_run(Agent(client), "Hello"))


async def _streamed(agent, question):
    stream = agent.run(question, stream=True)
    async for _ in stream:
        pass
    return await stream.get_final_response()


def stream():
    return _shown(loop.run_until_complete(_streamed(Agent(client), "Hello")))


def turns():
    agent = Agent(client)
    session = agent.create_session()
    _run(agent, "Hello", session=session)
    return _run(agent, "And you?", session=session).text


def tools():
    agent = Agent(client, tools=[weather])
    session = agent.create_session()
    return [_run(agent, question, session=session).text for question in ("Weather in Oslo?", "And tomorrow?")]


def streamed_tools():
    return loop.run_until_complete(_streamed(Agent(client, tools=[weather]), "Weather in Oslo?")).text


def structured():
    return [_run(Agent(client), "A color", options={"response_format": Color}).value.model_dump()]


def refused():
    try:
        _run(Agent(client), "Hi", options={"model": "none"})
    except Exception as error:
        return str(error)
