"""Limits on messages, tools and schemas: refused with the place, before any work, in every format."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4.server import size_limits

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chained(length: int) -> dict[str, Any]:
    """A schema whose references lead from one to the next."""
    steps = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(length)}
    return {"type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}}, "$defs": steps | {f"a{length}": True}}


def tool(path: str, schema: dict[str, Any]) -> dict[str, Any]:
    if path == MESSAGES:
        return {"name": "f", "input_schema": schema}
    function = {"name": "f", "parameters": schema}
    return {"type": "function", "function": function} if path == CHAT else {"type": "function"} | function


def body(path: str, **fields: Any) -> dict[str, Any]:
    ask: dict[str, Any] = {"input": HI} if path == RESPONSES else {"messages": HI, "max_tokens": 5}
    return {"model": "tiny"} | ask | fields


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_request_beyond_a_limit_is_refused_with_the_place(server, path: str) -> None:
    asked = "input" if path == RESPONSES else "messages"
    cases = [
        ({asked: HI * (size_limits.MAX_MESSAGES + 1)}, asked, "has 50001 elements; allowed: 50000"),
        ({"tools": [tool(path, {})] * 1025}, "tools", "has 1025 elements; allowed: 1024"),
        ({"tools": [tool(path, {}), tool(path, nested(40))]}, "tools[1]", "nested more than 64 levels deep"),
        ({"tools": [tool(path, {}), tool(path, chained(800))]}, "tools[1]", "levels deep; allowed: 1500"),
        ({"tools": [tool(path, {"description": "x" * (1 << 18)})]}, "tools[0]", "bytes of JSON; allowed: 262144"),
    ]
    for fields, place, message in cases:
        answer = server.http().post(path, json=body(path, **fields))
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == place and message in error["message"], fields.keys()


def test_forms_of_answers_have_the_same_limits(server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": nested(40)}}
    answer = server.http().post(CHAT, json=body(CHAT, response_format=form))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
    form = {"format": {"type": "json_schema", "schema": nested(40)}}
    answer = server.http().post(MESSAGES, json=body(MESSAGES, output_config=form))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "output_config"


def test_a_chain_of_references_within_the_limit_is_compiled(server) -> None:
    """llguidance follows it on the stack: a longer one would take the engine's process with it."""
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": chained(700)}}
    server.model.reply = '</think>{"a": 5}'
    assert server.http().post(CHAT, json=body(CHAT, response_format=form, max_tokens=9)).status_code == 200
    server.model.reply = "ok"


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("depth", [130, 100_000])
def test_a_deeply_nested_body_is_refused(server, path: str, depth: int) -> None:
    text = '{"model": "tiny", "messages": ' + "[" * depth + "]" * depth + "}"
    answer = server.http().post(path, content=text)
    assert answer.status_code == 400


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_requests_within_the_limits_pass(server, path: str) -> None:
    fields = {"messages": HI * 300, "tools": [tool(path, nested(30))]}
    assert server.http().post(path, json=body(path, **fields)).status_code == 200
