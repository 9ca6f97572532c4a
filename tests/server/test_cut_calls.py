"""Calls in which the model has stopped, as clients have them: none takes one for a whole call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_openai import ChatOpenAI

from tests.server.responses_api import DSML, STREAMED, WEATHER, output, prompt

PROPERTIES = {"path": {"type": "string"}, "dry_run": {"type": "boolean"}}
DELETE = {"name": "delete", "parameters": {"type": "object", "properties": PROPERTIES}}
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
CUT = (
    f'</think>\n\n{DSML}tool_calls>\n{DSML}invoke name="delete">\n{DSML}parameter name="path" string="true">/a'
    f'</｜DSML｜parameter>\n{DSML}parameter name="dry_run" string="false">tr'
)
BEGUN = '{"path": "/a", "dry_run": '


@STREAMED
def test_anthropics_sdk_has_its_text(server, streamed: bool) -> None:
    """It reads inputs of a stream as far as they come: there, too, they are those of the whole answer."""
    server.model.reply = CUT
    tool = {"name": "delete", "input_schema": DELETE["parameters"]}
    create = {"max_tokens": 500, "tools": [tool], **ASKED}
    client = server.anthropic()
    if streamed:
        with client.messages.stream(**create) as events:
            inputs = [event.snapshot for event in events if event.type == "input_json"]
            message = events.get_final_message()
        assert all(set(found) <= {"INVALID_JSON"} for found in inputs)
    else:
        message = client.messages.create(**create)
    (call,) = (part for part in message.content if part.type == "tool_use")
    assert (call.name, call.input, message.stop_reason) == ("delete", {"INVALID_JSON": BEGUN}, "tool_use")
    server.model.reply = "</think>I see."
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "not JSON", "is_error": True}
    history = [*ASKED["messages"], {"role": "assistant", "content": message.content}]
    create |= {"messages": [*history, {"role": "user", "content": [result]}]}
    assert client.messages.create(**create).content[-1].text == "I see."
    assert f'INVALID_JSON" string="true">{BEGUN}<' in prompt(server)


def test_openais_streaming_helper_has_no_json(server) -> None:
    server.model.reply = CUT
    with server.openai().chat.completions.stream(tools=[{"type": "function", "function": DELETE}], **ASKED) as stream:
        completion = stream.get_final_completion()
    (choice,) = completion.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.arguments == BEGUN + ', "INVALID_JSON": ]}'
    assert call.function.parsed_arguments is None


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_has_an_invalid_call(server, responses: bool) -> None:
    """It completes the JSON of a stream."""
    server.model.reply = CUT
    model = ChatOpenAI(model="tiny", base_url=server.url + "/v1", api_key="unused", use_responses_api=responses)
    whole = None
    for chunk in model.bind_tools([{"type": "function", "function": DELETE}]).stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.tool_calls == []
    (call,) = whole.invalid_tool_calls
    assert call["name"] == "delete"


@STREAMED
def test_an_item_of_a_response_is_incomplete(server, streamed: bool) -> None:
    """The response is complete: the model goes on with the client's report."""
    delete = {"type": "function", "strict": False, **DELETE}
    server.model.reply = CUT.replace("tool_calls>\n", f'tool_calls>\n{DSML}invoke name="weather">\n</｜DSML｜invoke>\n')
    response = output(server, streamed, tools=[WEATHER, delete])
    first, call = (item for item in response.output if item.type == "function_call")
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert (first.status, first.arguments, call.status) == ("completed", "{}", "incomplete")
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(call.arguments)
    server.model.reply = "</think>I see."
    results = [{"type": "function_call_output", "call_id": one.call_id, "output": "?"} for one in (first, call)]
    history = [{"role": "user", "content": "hi"}, first.model_dump(), call.model_dump(), *results]
    assert output(server, streamed, tools=[WEATHER, delete], input=history).output_text == "I see."
    assert BEGUN in prompt(server)


@STREAMED
@pytest.mark.parametrize("name", ["apply_patch", "shell"])
def test_the_input_of_a_custom_tool_is_incomplete(server, streamed: bool, name: str) -> None:
    """Any text is one: what there is of it stands in JSON that has no end, for clients that do not read the status."""
    tool = {"type": "custom", "name": name}
    begun = f'</think>\n\n{DSML}tool_calls>\n{DSML}invoke name="{name}">\n{DSML}parameter name="input" string="true">'
    server.model.reply = begun + "print(1)\npri"
    response = output(server, streamed, tools=[tool])
    (call,) = (item for item in response.output if item.type == "custom_tool_call")
    assert (call.status, response.status) == ("incomplete", "completed")
    if name == "shell":
        assert call.input == '{"input": "print(1)\\npri", "INVALID_JSON": ]}'
    server.model.reply = f"{begun}ls</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    (call,) = (item for item in output(server, streamed, tools=[tool]).output if item.type == "custom_tool_call")
    assert (call.status, call.input) == ("completed", "ls")
