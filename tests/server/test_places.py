"""A refusal names the field at fault, in its message and in error.param."""

import copy
import json
from collections.abc import Iterator

import anthropic
import deepseek_recipe as recipe
import openai
import pytest

from dsv4.server.refusals import describe

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
USER = {"role": "user", "content": "x"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def refused(server, path: str, request: dict | bytes) -> dict:
    if isinstance(request, dict):
        response = server.http().post(path, json={"model": "tiny", "messages": [USER]} | request)
    else:
        response = server.http().post(path, content=request)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request_error")
    return error


def call(**change) -> dict:
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}} | change
    return {"role": "assistant", "tool_calls": [{key: value for key, value in made.items() if value is not None}]}


def use(**change) -> dict:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}} | change]}


def tool(**change) -> dict:
    return {"role": "tool", "tool_call_id": "a", "content": "x"} | change


def chat(*messages: object) -> dict:
    return {"messages": [USER] * 137 + [*messages, USER]}


@pytest.mark.parametrize(
    ("request_", "place", "words"),
    [
        ({"temperature": "hot"}, "temperature", 'invalid type: string "hot", expected f32'),
        ({"thinking": True}, "thinking", "JSON body into the target type: thinking: invalid type: boolean `true`"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "unknown variant `maybe`"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens", 'invalid type: string "5"'),
        ({"temperature": [1]}, "temperature", "invalid type: sequence"),
        ({"stop": ["a", 5]}, "stop[1]", "invalid type: integer `5`"),
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage", "invalid type"),
        ({"tools": [FUNCTION, {"type": "function"}]}, "tools[1]", "missing field `function`"),
        ({"tools": [FUNCTION, {"type": "x", "function": {"name": "f"}}]}, "tools[1].type", "`x`"),
        ({"tools": [FUNCTION, {"type": "function", "function": {"name": 5}}]}, "tools[1].function.name", "`5`"),
        ({"messages": 5}, "messages", "invalid type: integer `5`"),
        (chat({"role": "bad", "content": "x"}), "messages[137].role", "unknown variant `bad`"),
        (chat({"role": "user", "content": 5}), "messages[137].content", "content should be a string or a list"),
        (chat({"role": "user"}), "messages[137]", "missing field `content`"),
        (chat({"content": "x"}), "messages[137]", "missing field `role`"),
        (chat(5), "messages[137]", "invalid type: integer `5`"),
        (chat({"role": "tool", "content": "x"}), "messages[137]", "missing field `tool_call_id`"),
        (chat(call(id=None), tool()), "messages[137].tool_calls[0]", "missing field `id`"),
        (chat(call(function={"name": "f", "arguments": {"a": 1}})),
         "messages[137].tool_calls[0].function.arguments", "map"),
        (chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}),
         "messages[137].content[1]", "`text`"),
        (chat({"role": "user", "content": [{"type": "zzz", "text": "a"}]}), "messages[137].content[0].type", "`zzz`"),
        # Faults found in conversion, not in parsing: the message begins with the hosted service's sentence.
        ({"temperature": 2.5}, "temperature", "Invalid temperature value, the valid range of temperature is [0, 2]"),
        ({"n": 2}, "n", "Invalid n value (currently only n = 1 is supported)"),
        ({"max_completion_tokens": 400_000}, "max_completion_tokens", "Invalid max_tokens value"),
        ({"max_tokens": 0}, "max_tokens", "Invalid max_tokens value, the valid range of max_tokens is [1, 393216]"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs must be set to true if top_logprobs is used."),
        ({"stream_options": {"include_usage": True}}, "stream_options", "should be set along with stream = true"),
        ({"response_format": {"type": "json_object"}}, "response_format", "must contain the word 'json' in some"),
        ({"model": "gpt-9"}, "model", "but you passed gpt-9."),
        ({"messages": []}, "messages", "Empty input messages"),
        ({"stop": ["a", ""]}, "stop[1]", "Invalid 'stop[1]'"),
        ({"tools": [FUNCTION, {"type": "function", "function": {"name": "a b"}}]}, "tools[1].function.name", "pattern"),
        ({"tools": [FUNCTION, {"type": "function", "function": {"name": "g", "parameters": {"type": 5}}}]},
         "tools[1]", "'g'"),
        (chat({"role": "assistant"}), "messages[137]", "content or tool_calls must be set"),
        (chat(call(), tool(), USER, tool()), "messages[140]", "must be a response to a preceding message"),
        (chat(call(), tool(), call(), USER), "messages[139]", "insufficient tool messages"),
        (chat(call(), tool(tool_call_id="zz")), "messages[138]", "did not have response messages: zz"),
    ],
)  # fmt: skip
def test_a_refused_chat_request_names_the_place(server, request_, place: str, words: str) -> None:
    error = refused(server, CHAT, request_)
    assert error["param"] == place and words in error["message"]
    assert "[" not in place or place in error["message"] or "Invalid '" in error["message"]


@pytest.mark.parametrize(
    ("request_", "place", "words"),
    [
        ({"temperature": "hot"}, "temperature", 'invalid type: string "hot", expected f32'),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]", "empty string"),
        ({"output_config": {"effort": "most"}}, "output_config.effort", "unknown variant `most`"),
        ({"system": [{"type": "text", "text": "x"}, {"type": "text"}]}, "system[1]", "missing field `text`"),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}, {}]}, "tools[1]", "missing field `name`"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools[0]", "Invalid schema for function 'f'"),
        (chat({"role": "bad", "content": "x"}), "messages[137].role", "unknown variant `bad`"),
        (chat({"role": "user", "content": [{"type": "zzz"}]}), "messages[137].content[0].type", "`zzz`"),
        (chat({"role": "user", "content": [{"type": "tool_result"}]}), "messages[137].content[0]", "`tool_use_id`"),
        (chat(use(name=5)), "messages[137].content[0].name", "invalid type: integer `5`"),
        (chat(use()), "messages[138]", "`tool_use` ids were found without `tool_result` blocks"),
        (chat({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]}),
         "messages[137].content[0]", "tool_result"),
    ],
)  # fmt: skip
def test_a_refused_message_names_the_place(server, request_, place: str, words: str) -> None:
    error = refused(server, MESSAGES, {"max_tokens": 5} | request_)
    assert error["param"] == place and words in error["message"]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (rb'{"model": "tiny", "messages": [{"role": "user", "content": "a \ud800"}]}', "messages[0].content"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a \xff"}]}', "messages[0].content"),
        (rb'{"model": "ti\udc00ny", "messages": []}', "model"),
        (rb'{"model": "tiny", "messages": [], "tools": [{}, {"name": "\ud800", "type": "custom"}]}', "tools[1].name"),
        (rb'{"model": "tiny", "messages": [], "stop": ["a", "\ud800"]}', "stop[1]"),
        (rb'{"model": "tiny", "messages": [{"\ud800": 1}]}', "messages[0] (the name of a field)"),
    ],
)
def test_invalid_text_is_refused_with_its_place(server, body: bytes, place: str) -> None:
    path = MESSAGES if b"\xff" in body else "/v1/messages/count_tokens" if place == "model" else CHAT
    error = refused(server, path, body)
    assert error["param"] == place and f"{place} holds bytes or escapes that are no text" in error["message"]
    assert "line 1 column" in error["message"]


def test_errors_of_syntax_keep_line_and_column(server) -> None:
    body = b'{"model": "tiny",\n"messages": [{"role": "developer",\n"content": NaN}]}'
    assert "expected value at line 3 column" in refused(server, CHAT, body)["message"], "of the body that came"
    assert "line 2 column 13" in refused(server, CHAT, b'{"model": "tiny",\n"messages": ]}')["message"]


def test_the_sdks_show_the_place(server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]\.role") as chat_error:
        server.openai().chat.completions.create(model="tiny", messages=[{"role": "bad", "content": "x"}])
    assert chat_error.value.param == "messages[0].role"
    with pytest.raises(anthropic.BadRequestError, match="temperature: invalid type"):
        server.anthropic().messages.create(
            model="tiny", max_tokens=5, messages=[USER], extra_body={"temperature": "hot"}
        )


def test_a_forced_tool_that_is_not_there_is_refused_while_thinking_too(server) -> None:
    choice = {"type": "function", "function": {"name": "g"}}
    for thinking in ("enabled", "disabled"):
        error = refused(server, CHAT, {"tools": [FUNCTION], "tool_choice": choice, "thinking": {"type": thinking}})
        assert "no function named 'g' was specified" in error["message"]


WHOLE_CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "r", **call()},
        tool(),
    ],
    "tools": [FUNCTION],
    "tool_choice": "auto",
    "stop": ["a"],
    "temperature": 1,
    "top_p": 0.5,
    "max_tokens": 5,
    "seed": 1,
    "logprobs": True,
    "thinking": {"type": "enabled"},
    "reasoning_effort": "low",
    "stream_options": {"include_usage": True},
}
WHOLE_MESSAGES = {
    "model": "tiny",
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
        use(),
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}]}],
        },
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "max_tokens": 5,
    "thinking": {"type": "enabled"},
    "output_config": {"effort": "low"},
    "stop_sequences": ["a"],
}


def paths(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def written(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


@pytest.mark.parametrize(
    ("parse", "whole"), [(recipe.ChatCompletionRequest, WHOLE_CHAT), (recipe.MessagesRequest, WHOLE_MESSAGES)]
)
def test_the_named_place_is_the_wrong_field(parse, whole) -> None:
    """Every value of a large request is replaced in turn, in seven ways; the place is the value or lies within it."""
    parse(json.dumps(whole).encode())
    found = 0
    for path in paths(whole):
        for value in (True, -1, 1.5, "zz", {"zz": 1}, [5], {"type": "zz"}):
            request = copy.deepcopy(whole)
            owner = request
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = value
            body = json.dumps(request).encode()
            try:
                parse(body)
            except ValueError as error:
                refused_ = describe(error, body, parse, parse)
                # An object put in place of another lacks a field or has a wrong field inside.
                assert (refused_.param or "").startswith(written(path)), (path, value, refused_)
                assert f": {refused_.param}: " in refused_.message
                found += 1
    assert found > 150


def test_the_search_for_a_place_ends_within_its_bound() -> None:
    """A long text beside many fields: only the message is named, after a few parses of the whole request."""
    fields = {f"field{index}": 1 for index in range(60)}
    spoilt = fields | {"role": "bad", "content": "x" * 3_000_000}
    body = json.dumps({"model": "tiny", "messages": [USER, spoilt]}).encode()
    read = 0

    def parse(part: bytes) -> object:
        nonlocal read
        read += len(part)
        return recipe.ChatCompletionRequest(part)

    with pytest.raises(ValueError) as error:
        recipe.ChatCompletionRequest(body)
    assert describe(error.value, body, parse, parse).param == "messages[1]"
    assert read < 3 * len(body) + 10_000_000
    many = {f"field{index}": 1 for index in range(5000)}
    many |= {"model": "x" * 4000, "messages": [USER], "temperature": "hot"}  # every tested part contains the model name
    body = json.dumps(many).encode()
    with pytest.raises(ValueError) as error:
        recipe.ChatCompletionRequest(body)
    refusal = describe(error.value, body, parse, parse)
    assert "hot" in refusal.message and refusal.param is None, "no place, but the refusal itself"


def test_a_wrong_model_is_named_beside_other_fields(server) -> None:
    http = server.http()
    for model, words in ((5, "model: invalid type: integer `5`"), ("gpt-9", "but you passed gpt-9.")):
        error = http.post(CHAT, json={"temperature": 1, "messages": [USER], "model": model}).json()["error"]
        assert error["param"] == "model" and words in error["message"]
    error = http.post(CHAT, json={"temperature": "hot"}).json()["error"]
    assert error["param"] == "temperature", "though the model is missing, too"
