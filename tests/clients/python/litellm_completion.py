"""LiteLLM's completion()."""

import json
from typing import Literal

import litellm
from configuration import options
from pydantic import BaseModel

USER = {"role": "user", "content": "A color as JSON"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": CITY},
}


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


PAINT = {"type": "function", "function": {"name": "Color", "strict": True, "parameters": Color.model_json_schema()}}


def _ask(messages, **more):
    return litellm.completion(**options, messages=messages, **more)


def _streamed(messages, **more):
    more |= {"stream": True, "stream_options": {"include_usage": True}}
    return litellm.stream_chunk_builder(list(_ask(messages, **more)), messages=messages)


def _shown(answer):
    message = answer.choices[0].message
    return {"text": message.content, "reasoning": message.reasoning_content, "tokens": answer.usage.total_tokens}


def chat():
    return _shown(_ask([{"role": "user", "content": "Hello"}]))


def stream():
    return _shown(_streamed([{"role": "user", "content": "Hello"}]))


def turns():
    messages = [{"role": "user", "content": "Hello"}]
    messages += [_ask(messages).choices[0].message, {"role": "user", "content": "And you?"}]
    return _ask(messages).choices[0].message.content


def _loop(messages, ask):
    while True:
        message = ask(messages, tools=[WEATHER]).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            text = f"sun in {json.loads(call.function.arguments)['city']}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})


def tools():
    messages = [{"role": "user", "content": "Weather in Oslo?"}]
    first = _loop(messages, _ask)
    messages.append({"role": "user", "content": "And tomorrow?"})
    return [first, _loop(messages, _ask)]


def streamed_tools():
    return _loop([{"role": "user", "content": "Weather in Oslo?"}], _streamed)


def forced():
    found = []
    for choice in ("required", {"type": "function", "function": {"name": "Color"}}):
        message = _ask([USER], tools=[PAINT], tool_choice=choice).choices[0].message
        found += [json.loads(call.function.arguments) for call in message.tool_calls]
    return found


def structured():
    answers = (_ask([USER], response_format=Color), _streamed([USER], response_format=Color))
    return [json.loads(answer.choices[0].message.content) for answer in answers]


def json_mode():
    return json.loads(_ask([USER], response_format={"type": "json_object"}).choices[0].message.content)


def refused():
    try:
        litellm.completion(**options | {"model": options["model"].partition("/")[0] + "/none"}, messages=[USER])
    except litellm.BadRequestError as error:
        return str(error)


def too_long():
    """The error by which programs on LiteLLM shorten a conversation."""
    try:
        _ask([{"role": "user", "content": "word " * 20000}])
    except litellm.ContextWindowExceededError as error:
        return str(error)
