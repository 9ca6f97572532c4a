"""anthropic-sdk-python."""

from typing import Literal

import anthropic
from configuration import client
from pydantic import BaseModel

COMMON = {"model": "deepseek-flash", "max_tokens": 2000}
USER = {"role": "user", "content": "A color"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather of a city", "input_schema": CITY}
COLOR = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}


class Color(BaseModel):
    color: Literal["red", "blue"]


@anthropic.beta_tool
def weather(city: str) -> str:
    """Weather of a city"""
    return f"sun in {city}"


def _text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def _shown(message):
    usage = message.usage
    return {
        "text": _text(message),
        "reasoning": "".join(block.thinking for block in message.content if block.type == "thinking"),
        "tokens": usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens,
    }


def chat():
    return _shown(client.messages.create(**COMMON, messages=[{"role": "user", "content": "Hello"}]))


def stream():
    with client.messages.stream(**COMMON, messages=[{"role": "user", "content": "Hello"}]) as stream:
        text = "".join(stream.text_stream)
        return _shown(stream.get_final_message()) | {"text": text}


def turns():
    messages = [{"role": "user", "content": "Hello"}]
    for question in ("And you?", None):
        message = client.messages.create(**COMMON, messages=messages)
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": question}]
    return _text(message)


def tools():
    messages, texts = [{"role": "user", "content": "Weather in Oslo?"}], []
    for question in ("And tomorrow?", None):
        while True:
            message = client.messages.create(**COMMON, messages=messages, tools=[WEATHER])
            messages.append({"role": "assistant", "content": message.content})
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": f"sun in {block.input['city']}"}
                for block in message.content
                if block.type == "tool_use"
            ]
            if not results:
                break
            messages.append({"role": "user", "content": results})
        texts.append(_text(message))
        messages.append({"role": "user", "content": question})
    return texts


def _runner(**options):
    question = {"role": "user", "content": "Weather in Oslo?"}
    return client.beta.messages.tool_runner(**COMMON, messages=[question], tools=[weather], **options)


def streamed_tools():
    for stream in _runner(stream=True):
        message = stream.get_final_message()
    return _text(message)


def runner():
    """It opens a thread, and goes on without when the server has none."""
    return _text(_runner().until_done())


def runner_without_thread():
    return _text(_runner(thread=False).until_done())


def forced():
    found = []
    tool = {"name": "Color", "input_schema": COLOR, "strict": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "Color"}):
        message = client.messages.create(**COMMON, messages=[USER], tools=[tool], tool_choice=choice)
        found += [block.input for block in message.content if block.type == "tool_use"]
    return found


def structured():
    with client.messages.stream(**COMMON, messages=[USER], output_format=Color) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.parse(**COMMON, messages=[USER], output_format=Color)
    return [message.parsed_output.model_dump() for message in (whole, streamed)]


def refused():
    try:
        client.messages.create(max_tokens=9, model="none", messages=[USER])
    except anthropic.BadRequestError as error:
        return str(error)
