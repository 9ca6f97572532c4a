"""LlamaIndex's chat models."""

from typing import Literal

from configuration import model
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel


class Color(BaseModel, extra="forbid"):
    """A color."""

    color: Literal["red", "blue"]


def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


WEATHER = FunctionTool.from_defaults(weather)


def _shown(answer):
    thoughts = [block.content for block in answer.message.blocks if type(block).__name__ == "ThinkingBlock"]
    usage = answer.raw["usage"] if isinstance(answer.raw, dict) else answer.raw.usage
    return {"text": answer.message.content, "reasoning": "".join(thoughts), "tokens": usage.total_tokens}


def chat():
    return _shown(model.chat([ChatMessage("Hello")]))


def stream():
    *_, last = model.stream_chat([ChatMessage("Hello")], stream_options={"include_usage": True})
    return _shown(last)


def turns():
    messages = [ChatMessage("Hello")]
    messages += [model.chat(messages).message, ChatMessage("And you?")]
    return model.chat(messages).message.content


def _loop(messages, ask):
    while True:
        answer = ask([WEATHER], chat_history=messages)
        messages.append(answer.message)
        calls = model.get_tool_calls_from_response(answer, error_on_no_tool_call=False)
        if not calls:
            return answer.message.content
        for call in calls:
            more = {"tool_call_id": call.tool_id}
            messages.append(ChatMessage(weather(**call.tool_kwargs), role="tool", additional_kwargs=more))


def tools():
    messages = [ChatMessage("Weather in Oslo?")]
    first = _loop(messages, model.chat_with_tools)
    messages.append(ChatMessage("And tomorrow?"))
    return [first, _loop(messages, model.chat_with_tools)]


def streamed_tools():
    def ask(tools, **options):
        *_, last = model.stream_chat_with_tools(tools, **options)
        return last

    return _loop([ChatMessage("Weather in Oslo?")], ask)


def structured_tools():
    """Tool choice "required", and by name."""
    program = FunctionCallingProgram.from_defaults(Color, prompt_template_str="A color", llm=model)
    return [program().model_dump()]


def structured():
    strict = model.model_copy(update={"should_use_structured_outputs": True})
    return [strict.as_structured_llm(Color).chat([ChatMessage("A color")]).raw.model_dump()]


def refused():
    try:
        model.model_copy(update={"model": "none"}).chat([ChatMessage("Hi")])
    except Exception as error:
        return str(error)
