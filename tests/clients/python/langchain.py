"""LangChain's chat models."""

from typing import Literal

from configuration import model
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field


class Color(BaseModel, extra="forbid"):
    """A color."""

    color: Literal["red", "blue"] = Field(description="the color")


@tool
def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _reasoning(message):
    blocks = [block for block in message.content_blocks if block["type"] == "reasoning"]
    return "".join(block.get("reasoning", "") for block in blocks)


def _shown(message):
    return {
        "text": message.text,
        "reasoning": _reasoning(message),
        "tokens": message.usage_metadata["total_tokens"],
    }


def chat():
    return _shown(model.invoke("Hello"))


def stream():
    whole = None
    for chunk in model.stream("Hello"):
        whole = chunk if whole is None else whole + chunk
    return _shown(whole)


def turns():
    messages = [HumanMessage("Hello")]
    messages += [model.invoke(messages), HumanMessage("And you?")]
    return model.invoke(messages).text


def _loop(messages, ask):
    while True:
        message = ask(messages)
        messages.append(message)
        if not message.tool_calls:
            return message.text
        messages += [ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]) for call in message.tool_calls]


def tools():
    messages, able = [HumanMessage("Weather in Oslo?")], model.bind_tools([weather])
    first = _loop(messages, able.invoke)
    messages.append(HumanMessage("And tomorrow?"))
    return [first, _loop(messages, able.invoke)]


def streamed_tools():
    able = model.bind_tools([weather])

    def ask(messages):
        whole = None
        for chunk in able.stream(messages):
            whole = chunk if whole is None else whole + chunk
        return whole

    return _loop([HumanMessage("Weather in Oslo?")], ask)


def forced():
    found = []
    for choice in ("any", "Color"):
        message = model.bind_tools([Color], tool_choice=choice).invoke("A color")
        found += [call["args"] for call in message.tool_calls]
    return found


def structured():
    """ChatDeepSeek forces a tool for it, which has to be strict; ChatAnthropic takes no `strict`."""
    strict = {} if type(model).__name__ == "ChatAnthropic" else {"strict": True}
    return [model.with_structured_output(Color, method="json_schema", **strict).invoke("A color").model_dump()]


def structured_tools():
    return [model.with_structured_output(Color, method="function_calling").invoke("A color").model_dump()]


def json_mode():
    return model.with_structured_output(Color, method="json_mode").invoke("A color as JSON").model_dump()


def refused():
    try:
        model.model_copy(update={"model_name" if hasattr(model, "model_name") else "model": "none"}).invoke("Hi")
    except Exception as error:
        return str(error)
