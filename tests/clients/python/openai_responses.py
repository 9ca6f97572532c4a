"""openai-python over Responses."""

import json
from typing import Literal

import openai
from configuration import client
from pydantic import BaseModel

MODEL = "deepseek-flash"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Weather of a city",
    "strict": False,
    "parameters": CITY,
}


class Color(BaseModel):
    color: Literal["red", "blue"]


def _shown(answer):
    thoughts = [part.text for item in answer.output if item.type == "reasoning" for part in item.content]
    return {"text": answer.output_text, "reasoning": "".join(thoughts), "tokens": answer.usage.total_tokens}


def chat():
    return _shown(client.responses.create(model=MODEL, input="Hello"))


def stream():
    text = ""
    with client.responses.stream(model=MODEL, input="Hello") as stream:
        for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
        return _shown(stream.get_final_response()) | {"text": text}


def turns():
    """The server keeps the conversation."""
    first = client.responses.create(model=MODEL, input="Hello")
    return client.responses.create(model=MODEL, input="And you?", previous_response_id=first.id).output_text


def _results(answer):
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": f"sun in {json.loads(item.arguments)['city']}",
        }
        for item in answer.output
        if item.type == "function_call"
    ]


def tools():
    """The client keeps the conversation."""
    items, texts = [{"role": "user", "content": "Weather in Oslo?"}], []
    options = {"model": MODEL, "tools": [WEATHER], "store": False, "include": ["reasoning.encrypted_content"]}
    for question in ("And tomorrow?", None):
        results = [None]
        while results:
            answer = client.responses.create(input=items, **options)
            results = _results(answer)
            items += [*answer.output, *results]
        texts.append(answer.output_text)
        items.append({"role": "user", "content": question})
    return texts


def streamed_tools():
    """The server keeps the conversation."""
    items, previous = [{"role": "user", "content": "Weather in Oslo?"}], openai.omit
    while items:
        options = {"model": MODEL, "tools": [WEATHER], "previous_response_id": previous}
        with client.responses.stream(input=items, **options) as stream:
            answer = stream.get_final_response()
        items, previous = _results(answer), answer.id
    return answer.output_text


def forced():
    tool = openai.pydantic_function_tool(Color)["function"]
    paint = {"type": "function", **tool}
    found = []
    for choice in ("required", {"type": "function", "name": "Color"}):
        answer = client.responses.parse(model=MODEL, input="A color", tools=[paint], tool_choice=choice)
        found += [json.loads(item.arguments) for item in answer.output if item.type == "function_call"]
    return found


def structured():
    options = {"model": MODEL, "input": "A color", "text_format": Color}
    with client.responses.stream(**options) as stream:
        streamed = stream.get_final_response()
    return [answer.output_parsed.model_dump() for answer in (client.responses.parse(**options), streamed)]


def refused():
    try:
        client.responses.create(model="none", input="Hi")
    except openai.BadRequestError as error:
        return str(error)
