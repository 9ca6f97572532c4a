"""openai-python over Chat Completions."""

import json
from typing import Literal

import openai
from configuration import client
from pydantic import BaseModel

MODEL = "deepseek-flash"
USER = {"role": "user", "content": "A color"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": CITY},
}


class Color(BaseModel):
    color: Literal["red", "blue"]


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
    message = answer.choices[0].message
    return {"text": message.content, "reasoning": message.reasoning_content, "tokens": answer.usage.total_tokens}


def stream():
    text, reasoning, tokens = "", "", 0
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    ):
        tokens = chunk.usage.total_tokens if chunk.usage else tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    return {"text": text, "reasoning": reasoning, "tokens": tokens}


def turns():
    messages = [{"role": "user", "content": "Hello"}]
    for question in ("And you?", None):
        message = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message
        messages += [message, {"role": "user", "content": question}]
    return message.content


def tools():
    messages, texts = [{"role": "user", "content": "Weather in Oslo?"}], []
    for question in ("And tomorrow?", None):
        while True:
            message = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0].message
            messages.append(message)
            if not message.tool_calls:
                break
            messages += [_result(call.id, call.function) for call in message.tool_calls]
        texts.append(message.content)
        messages.append({"role": "user", "content": question})
    return texts


def streamed_tools():
    messages = [{"role": "user", "content": "Weather in Oslo?"}]
    while True:
        with client.chat.completions.stream(model=MODEL, messages=messages, tools=[WEATHER]) as stream:
            message = stream.get_final_completion().choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content
        messages += [_result(call.id, call.function) for call in message.tool_calls]


def _result(call_id, function):
    return {"role": "tool", "tool_call_id": call_id, "content": f"sun in {json.loads(function.arguments)['city']}"}


def forced():
    paint = openai.pydantic_function_tool(Color)
    found = []
    for choice in ("required", {"type": "function", "function": {"name": "Color"}}):
        answer = client.chat.completions.parse(model=MODEL, messages=[USER], tools=[paint], tool_choice=choice)
        found.append(answer.choices[0].message.tool_calls[0].function.parsed_arguments.model_dump())
    return found


def structured():
    options = {"model": MODEL, "messages": [USER], "response_format": Color}
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion()
    answers = (client.chat.completions.parse(**options), streamed)
    return [answer.choices[0].message.parsed.model_dump() for answer in answers]


def json_mode():
    form = {"type": "json_object"}
    question = {"role": "user", "content": "A color as JSON"}  # without the word the request is refused
    answer = client.chat.completions.create(model=MODEL, messages=[question], response_format=form)
    return json.loads(answer.choices[0].message.content)


def refused():
    try:
        client.chat.completions.create(model="none", messages=[USER])
    except openai.BadRequestError as error:
        return str(error)
