"""Semantic Kernel: its chat service, and an agent on it."""

import asyncio
from typing import Literal

from configuration import service
from pydantic import BaseModel
from semantic_kernel.agents import ChatCompletionAgent
from semantic_kernel.connectors.ai.open_ai import OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import kernel_function

loop = asyncio.new_event_loop()  # the client's connections live on one loop


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


class Weather:
    @kernel_function(name="weather", description="Weather of a city")
    def weather(self, city: str) -> str:
        return f"sun in {city}"


def _ask(history, **settings):
    asked = service.get_chat_message_content(history, OpenAIChatPromptExecutionSettings(**settings))
    return loop.run_until_complete(asked)


def _history(text):
    history = ChatHistory()
    history.add_user_message(text)
    return history


def _tokens(usage):
    return usage.prompt_tokens + usage.completion_tokens


def chat():
    message = _ask(_history("Hello"))
    return {"text": str(message), "reasoning": "", "tokens": _tokens(message.metadata["usage"])}


def stream():
    async def read():
        text, tokens = "", 0
        settings = OpenAIChatPromptExecutionSettings(stream_options={"include_usage": True})
        async for part in service.get_streaming_chat_message_content(_history("Hello"), settings):
            text += str(part)
            usage = part.metadata.get("usage")
            tokens = _tokens(usage) if usage else tokens
        return {"text": text, "reasoning": "", "tokens": tokens}

    return loop.run_until_complete(read())


def turns():
    history = _history("Hello")
    history.add_message(_ask(history))
    history.add_user_message("And you?")
    return str(_ask(history))


def plugin():
    """Its tool is named after its plugin and its function."""
    agent = ChatCompletionAgent(service=service, name="assistant", plugins=[Weather()])
    return str(loop.run_until_complete(agent.get_response("Weather in Oslo?")).message)


def structured():
    return [Color.model_validate_json(str(_ask(_history("A color"), response_format=Color))).model_dump()]


def refused():
    try:
        _ask(_history("Hi"), ai_model_id="none")
    except Exception as error:
        return repr(error.__cause__ or error)
