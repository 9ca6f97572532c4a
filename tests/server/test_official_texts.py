"""The hosted service's refusals, word for word, with the place that this server adds in `param`."""

from __future__ import annotations

from typing import Any

import pytest

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/anthropic/v1/messages", "/v1/responses"
USER: dict[str, Any] = {"role": "user", "content": "x"}


def function(name: str = "f", **change: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "parameters": schema, **change}}


def calls(*ids: str) -> dict[str, Any]:
    made = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "tool_calls": made}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x"}


def uses(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": i, "name": "f", "input": {}} for i in ids]}


def results(*ids: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": i, "content": "x"} for i in ids]}


def item(role: str, text: str = "x") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


def function_call(call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def function_output(call_id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": "x"}


ANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
)
ORPHAN = "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
OFFICIAL: list[tuple[str, dict[str, Any], str, str | None]] = [
    (CHAT, {"messages": []}, "Empty input messages", "messages"),
    (CHAT, {"temperature": 2.1}, "Invalid temperature value, the valid range of temperature is [0, 2]", "temperature"),
    (CHAT, {"top_p": 0}, "Invalid top_p value, the valid range of top_p is (0, 1.0]", "top_p"),
    (CHAT, {"presence_penalty": 3}, "Invalid presence_penalty value, the valid range of presence_penalty is [-2, 2]",
     "presence_penalty"),
    (CHAT, {"frequency_penalty": -3}, "the valid range of frequency_penalty is [-2, 2]", "frequency_penalty"),
    (CHAT, {"max_tokens": 0}, "Invalid max_tokens value, the valid range of max_tokens is [1, 393216]", "max_tokens"),
    (CHAT, {"stop": ["x"] * 17}, "Stop string array too long: 17", "stop"),
    (CHAT, {"stop": [""]}, "Invalid 'stop[0]': empty string.", "stop[0]"),
    (CHAT, {"n": 2}, "Invalid n value (currently only n = 1 is supported)", "n"),
    (CHAT, {"stream_options": {"include_usage": True}},
     "stream_options should be set along with stream = true", "stream_options"),
    (CHAT, {"top_logprobs": 2}, "logprobs must be set to true if top_logprobs is used.", "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "the valid range of top_logprobs is [0, 20].", "top_logprobs"),
    (CHAT, {"response_format": {"type": "json_object"}},
     "Prompt must contain the word 'json' in some form to use 'response_format' of type 'json_object'.",
     "response_format"),
    (CHAT, {"tools": [function(), function()]}, "Tool names must be unique.", "tools"),
    (CHAT, {"tools": [function(strict=True), function("g")]},
     "Cannot use strict tool with non-strict tool in the same request", "tools"),
    (CHAT, {"tools": [function()], "tool_choice": {"type": "function", "function": {"name": "foo"}}},
     "no function named 'foo' was specified in the 'tools' parameter.", "tool_choice"),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": None}]},
     "Invalid assistant message: content or tool_calls must be set", "messages[1]"),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": []}]},
     "Invalid 'messages[1].tool_calls': empty array.", "messages[1].tool_calls"),
    (CHAT, {"messages": [USER, calls("a", "b"), result("a"), USER]},
     f"{ANSWERED}(insufficient tool messages following tool_calls message)", "messages[1]"),
    (CHAT, {"messages": [USER, calls("a"), result("zz")]},
     "The following tool_call_ids did not have response messages: zz", "messages[2]"),
    (CHAT, {"messages": [USER, result("a")]}, ORPHAN, "messages[1]"),
    (CHAT, {"messages": [USER, calls("a"), result("a"), result("a")]}, ORPHAN, "messages[3]"),
    (CHAT, {"messages": [USER, calls("c1", "c1"), result("c1")]},
     "Duplicate value for 'tool_call_id' of c1 in message[1]", "messages[1]"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "prefix": True}, USER]},
     "Invalid completion message: prefix set true with message which is not final message or message role is not"
     " assistant", "messages"),
    (MESSAGES, {"messages": []}, "messages: at least one message is required", "messages"),
    (MESSAGES, {"messages": [USER, uses("t1"), USER]},
     "messages.2: `tool_use` ids were found without `tool_result` blocks immediately after: t1. Each `tool_use` block"
     " must have a corresponding `tool_result` block in the next message.", "messages[2]"),
    (MESSAGES, {"messages": [USER, {"role": "assistant", "content": "x"}, results("t1")]},
     "unexpected `messages.2.content.0: tool_use_id` found in `tool_result` blocks: t1.", "messages[2].content[0]"),
    (MESSAGES, {"messages": [USER, uses("t1", "t1"), results("t1")]},
     "messages.1.content.1: `tool_use` ids must be unique", "messages[1].content[1]"),
    (MESSAGES, {"messages": [USER, uses("t1"), results("t1", "t1")]},
     "messages.2.content.1: each tool_use must have a single result. Found multiple `tool_result` blocks with id: t1",
     "messages[2].content[1]"),
    (MESSAGES, {"messages": [{"role": "user", "content": []}]}, "messages.0: all messages must have non-empty content",
     "messages[0]"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x", "signature": ""}]}]},
     "messages.0.content: thinking blocks may only be in `assistant` messages", "messages[0]"),
    (MESSAGES, {"max_tokens": 0}, "max_tokens", "max_tokens"),
    (RESPONSES, {"input": None}, "Either input or instructions must be provided", "input"),
    (RESPONSES, {"input": []}, "Input items array must not be empty", "input"),
    (RESPONSES, {"input": [item("user"), function_call("c1")]}, "No tool output found for tool call c1.", "input[1]"),
    (RESPONSES, {"input": [item("user"), function_output("c1")]},
     "No tool call found for tool output with call_id c1.", "input[1]"),
    (RESPONSES, {"max_output_tokens": 0}, "Invalid max_tokens value", "max_output_tokens"),
    (RESPONSES, {"temperature": 3}, "Invalid temperature value, the valid range of temperature is [0, 2]",
     "temperature"),
    (RESPONSES, {"input": [item("user")] * 137 + [item("nobody")]}, "nobody", "input[137].role"),
    (RESPONSES, {"input": [item("user"), {**function_call("c"), "arguments": 5}]}, "integer `5`",
     "input[1].arguments"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "words", "place"), OFFICIAL, ids=lambda value: str(value)[:40])
def test_a_refusal_has_the_official_words_and_the_place(
    server, path: str, body: dict[str, Any], words: str, place: str | None
) -> None:
    asked = {"input": "x"} if path == RESPONSES else {"messages": [USER], "max_tokens": 9}
    response = server.http().post(path, json={"model": "tiny", **asked, **body})
    assert response.status_code == 400, response.text
    answer = response.json()
    error = answer["error"]
    assert words in error["message"]
    assert error["param"] == place, error
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.get("type") == "error") is (path == MESSAGES)
