"""AutoGen's model client, and an agent on it."""

import asyncio
import json
from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import AssistantMessage, UserMessage
from autogen_core.tools import FunctionTool
from configuration import client
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _painted(color: Literal["red", "blue"]) -> str:
    return color


PAINT = FunctionTool(_painted, "Paints", name="paint")
loop = asyncio.new_event_loop()  # the client's connections live on one loop


def _user(text):
    return UserMessage(content=text, source="user")


def _ask(messages, **options):
    return loop.run_until_complete(client.create(messages, **options))


def _shown(result):
    usage = result.usage
    return {
        "text": result.content,
        "reasoning": result.thought,
        "tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def chat():
    return _shown(_ask([_user("Hello")]))


def stream():
    async def read():
        async for part in client.create_stream([_user("Hello")], include_usage=True):
            last = part
        return last

    return _shown(loop.run_until_complete(read()))


def turns():
    messages = [_user("Hello")]
    messages += [AssistantMessage(content=_ask(messages).content, source="assistant"), _user("And you?")]
    return _ask(messages).content


def _agent(**options):
    return AssistantAgent("assistant", client, tools=[weather], max_tool_iterations=4, **options)


def tools():
    agent = _agent()
    results = [loop.run_until_complete(agent.run(task=task)) for task in ("Weather in Oslo?", "And tomorrow?")]
    return [result.messages[-1].content for result in results]


def streamed_tools():
    return loop.run_until_complete(_agent(model_client_stream=True).run(task="Weather in Oslo?")).messages[-1].content


def forced():
    found = []
    for choice in ("required", PAINT):
        found += [
            json.loads(call.arguments) for call in _ask([_user("A color")], tools=[PAINT], tool_choice=choice).content
        ]
    return found


def structured():
    return [Color.model_validate_json(_ask([_user("A color")], json_output=Color).content).model_dump()]


def json_mode():
    return json.loads(_ask([_user("A color as JSON")], json_output=True).content)


def refused():
    try:
        _ask([_user("Hi")], extra_create_args={"model": "none"})
    except Exception as error:
        return str(error)
