"""The OpenAPI document: valid, complete, and true of real requests and answers."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate

USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
FLAT = {"type": "function", **FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REPLY = (
    'so</think><｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">b</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


@pytest.fixture
def document(server) -> dict[str, Any]:
    return server.http().get("/openapi.json").json()


def schema_of(document: dict[str, Any], *place: str) -> dict[str, Any]:
    """A schema of the document, with what it refers to."""
    found: Any = document
    for name in place:
        found = found[name]
    return {**found["content"]["application/json"]["schema"], "components": document["components"]}


def test_the_document_is_valid_and_has_every_route(server, document) -> None:
    validate(document)
    paths = set(document["paths"])
    for path in ("/v1/chat/completions", "/beta/completions", "/anthropic/v1/messages", "/v1/messages/count_tokens",
                 "/tokenize", "/detokenize", "/health", "/health/deep", "/v1/models", "/v1/models/{name}"):  # fmt: skip
        assert path in paths
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert "$ref" in answer, f"{method} {path} has no schema"
            if method == "post" and not path.endswith("/cancel"):  # which has no body
                assert "$ref" in operation["requestBody"]["content"]["application/json"]["schema"], path


CHAT, COMPLETIONS, MESSAGES, COUNT, RESPONSES, INPUT_TOKENS = (
    "/v1/chat/completions", "/v1/completions", "/anthropic/v1/messages", "/v1/messages/count_tokens",
    "/v1/responses", "/v1/responses/input_tokens",
)  # fmt: skip
GOOD = [
    (CHAT, {"messages": [USER]}),
    (CHAT, {"messages": [USER], "thinking": {"type": "disabled"}, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "reasoning_effort": "low",
            "max_tokens": 40}),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "c", "content": "x"}], "tools": [TOOL]}),
    (CHAT, {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, USER], "unknown": 1}),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "a", "prefix": True}]}),
    (COMPLETIONS, {"prompt": "a"}),
    (COMPLETIONS, {"prompt": ["a", [5, 6]], "logprobs": 2, "echo": True, "n": 2, "logit_bias": {"5": 1.5}}),
    (COMPLETIONS, {"prompt": "a", "suffix": "b", "stop": ["c"], "user_id": 5}),
    (MESSAGES, {"messages": [USER], "max_tokens": 20}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 500_000,
                "system": "s", "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}]}),
    (COUNT, {"messages": [USER]}),
    (RESPONSES, {"input": "hi"}),
    (RESPONSES, {"input": [USER], "instructions": "s", "tools": [FLAT], "tool_choice": "required", "store": False,
                 "max_output_tokens": 40}),
    (RESPONSES, {"input": [USER], "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "max_output_tokens": 3}),
    (RESPONSES, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                           {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                           {"type": "function_call_output", "call_id": "c", "output": "x"}], "truncation": "auto"}),
    (RESPONSES, {"input": [USER], "text": {"format": {"type": "json_schema", "name": "n", "schema": OBJECT}}}),
    (INPUT_TOKENS, {"input": "hi"}),
    ("/tokenize", {"messages": [USER]}),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/detokenize", {"tokens": [5]}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields"), GOOD)
def test_accepted_requests_and_their_answers_fit_their_schemas(server, document, path: str, fields: dict) -> None:
    server.model.reply = REPLY if fields.get("tools") else "so</think>ok"
    body = {"model": "tiny"} | fields
    jsonschema.validate(body, schema_of(document, "paths", path, "post", "requestBody"))
    response = server.http().post(path, json=body)
    assert response.status_code == 200, response.text
    jsonschema.validate(response.json(), schema_of(document, "paths", path, "post", "responses", "200"))


BAD = [
    (CHAT, {}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}),
    (CHAT, {"messages": [USER], "max_tokens": 393217}),
    (CHAT, {"messages": [USER], "temperature": 3}),
    (CHAT, {"messages": [USER], "n": 2}),
    (CHAT, {"messages": [USER], "tools": [{"type": "function", "function": {"name": "a b"}}]}),
    (COMPLETIONS, {}),
    (COMPLETIONS, {"prompt": [["a"]]}),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}),
    (MESSAGES, {"messages": []}),
    (MESSAGES, {"messages": [USER], "tool_choice": {"type": "required"}}),
    (COUNT, {}),
    (RESPONSES, {"input": 5}),
    (RESPONSES, {"input": "a", "store": "no"}),
    (RESPONSES, {"input": "a", "truncation": "all"}),
    (RESPONSES, {"input": "a", "metadata": {"a": 1}}),
    (RESPONSES, {"input": "a", "tool_choice": {"type": "allowed_tools", "mode": "none", "tools": []}}),
    (INPUT_TOKENS, {"input": "a", "parallel_tool_calls": 1}),
    ("/detokenize", {}),
]


@pytest.mark.parametrize(("path", "fields"), BAD)
def test_what_the_schema_excludes_the_server_refuses(server, document, path: str, fields: dict) -> None:
    body = {"model": "tiny"} | fields
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, schema_of(document, "paths", path, "post", "requestBody"))
    response = server.http().post(path, json=body)
    assert response.status_code == 400, response.text
    jsonschema.validate(response.json(), schema_of(document, "paths", path, "post", "responses", "400"))


def test_a_stored_response_and_its_items_fit(server, document) -> None:
    http = server.http()
    answer = http.post(RESPONSES, json={"model": "tiny", "input": "hi"}).json()
    one, place = f"{RESPONSES}/{answer['id']}", f"{RESPONSES}/{{response_id}}"
    jsonschema.validate(http.get(one).json(), schema_of(document, "paths", place, "get", "responses", "200"))
    items = schema_of(document, "paths", f"{place}/input_items", "get", "responses", "200")
    jsonschema.validate(http.get(f"{one}/input_items").json(), items)
    jsonschema.validate(http.delete(one).json(), schema_of(document, "paths", place, "delete", "responses", "200"))
    gone = http.get(one)
    assert gone.status_code == 404
    jsonschema.validate(gone.json(), schema_of(document, "paths", place, "get", "responses", "404"))


@pytest.mark.parametrize("path", ["/health", "/health/deep", "/v1/models", "/anthropic/v1/models"])
def test_answers_without_a_request_fit_too(server, document, path: str) -> None:
    answer = server.http().get(path).json()
    jsonschema.validate(answer, schema_of(document, "paths", path, "get", "responses", "200"))


def test_the_document_needs_the_key(serve, model) -> None:
    with serve(model, api_keys=["sk-1"]) as served:
        assert served.http().get("/openapi.json").status_code == 401
        assert served.http().get("/openapi.json", headers={"x-api-key": "sk-1"}).json()["openapi"].startswith("3.1")
