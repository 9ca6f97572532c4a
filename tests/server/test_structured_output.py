"""Forms of answers through the real SDKs: a model that writes something else gives them too."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from dsv4.engine.constraint import Constraint
from dsv4.server.chat_completions import CHAT
from dsv4.server.isolation import cache_salt
from dsv4.server.messages import MESSAGES
from dsv4.server.served_models import ServedModel, ServedModels
from dsv4.server.service import ChatService
from dsv4.server.wire_format import WireFormat
from dsv4.tokenizer import Tokenizer
from tests.server.responses_api import output

USER = {"role": "user", "content": "Give me json."}
COLOR = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}, "n": {"type": "integer", "enum": [1, 22]}},
    "required": ["color", "n"],
    "additionalProperties": False,
}
NAMES = ("paint", "erase")
ONE = {"type": "auto", "disable_parallel_tool_use": True}
OTHER_REPLIES = ("No.", "thoughts</think>No.", '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="x">')
THINKING = pytest.mark.parametrize("thinking", [True, False])
STREAMED = pytest.mark.parametrize("streamed", [True, False])


class Color(BaseModel):
    color: Literal["red", "blue"]
    n: Literal[1, 22]


def switch(thinking: bool) -> dict[str, Any]:
    return {"thinking": {"type": "enabled" if thinking else "disabled"}}


def reply_of(thinking: bool, text: str = "No.") -> str:
    return f"I think.</think>{text}" if thinking else text


def chat(server: Any, streamed: bool, thinking: bool, **options: Any) -> tuple[str, list[tuple[str, Any]], str]:
    """(content, calls, finish reason) of an answer of Chat Completions."""
    create = server.openai().chat.completions.create
    options = {"model": "tiny", "messages": [USER], "extra_body": switch(thinking), "max_tokens": 600} | options
    if not streamed:
        choice = create(**options).choices[0]
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
        return choice.message.content, calls, choice.finish_reason
    content, names, arguments, reason = "", [], [], ""
    for chunk in create(stream=True, **options):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        content += delta.content or ""
        for piece in delta.tool_calls or []:
            if piece.function.name:
                names.append(piece.function.name)
                arguments.append("")
            arguments[-1] += piece.function.arguments or ""
    return content, list(zip(names, map(json.loads, arguments), strict=True)), reason


def messages(server: Any, streamed: bool, thinking: bool, **options: Any) -> tuple[str, list[tuple[str, Any]], str]:
    """(content, calls, stop reason) of an answer of Messages."""
    client = server.anthropic()
    options = {"model": "tiny", "messages": [USER], "max_tokens": 600, "extra_body": switch(thinking)} | options
    if streamed:
        with client.messages.stream(**options) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**options)
    text = "".join(block.text for block in message.content if block.type == "text")
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    return text, calls, message.stop_reason


def functions(strict: bool) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": COLOR, "strict": strict}} for name in NAMES]


def tools(strict: bool) -> list[dict[str, Any]]:
    return [{"name": name, "input_schema": COLOR, "strict": strict} for name in NAMES]


@THINKING
@STREAMED
def test_json_of_a_schema(server, thinking: bool, streamed: bool) -> None:
    server.model.reply = reply_of(thinking)
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR, "strict": True}}
    content, _, reason = chat(server, streamed, thinking, response_format=form)
    jsonschema.validate(json.loads(content), COLOR)
    assert reason == "stop"
    format_ = {"type": "json_schema", "schema": COLOR}
    content, _, reason = messages(server, streamed, thinking, output_config={"format": format_})
    jsonschema.validate(json.loads(content), COLOR)
    assert reason == "end_turn"
    content, _, _ = messages(server, streamed, thinking, extra_body={"output_format": format_} | switch(thinking))
    jsonschema.validate(json.loads(content), COLOR)


def test_the_schema_of_messages_stands_in_the_prompt(server, folder) -> None:
    messages(server, False, False, output_config={"format": {"type": "json_schema", "schema": COLOR}})
    chat_form = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR}}
    chat(server, False, False, response_format=chat_form)
    ours, theirs = (Tokenizer.from_pretrained(folder).decode(prompt) for prompt in server.model.prompts)
    assert json.dumps(COLOR) in ours and ours == theirs


def test_the_sdks_parse_into_classes(server) -> None:
    server.model.reply = reply_of(True)
    parsed = server.openai().chat.completions.parse(model="tiny", messages=[USER], response_format=Color)
    assert isinstance(parsed.choices[0].message.parsed, Color)
    if hasattr(server.anthropic().messages, "parse"):
        message = server.anthropic().messages.parse(model="tiny", messages=[USER], max_tokens=600, output_format=Color)
        assert isinstance(message.parsed_output, Color)


@THINKING
@STREAMED
@pytest.mark.parametrize("strict", [True, False])
def test_forced_calls(server, thinking: bool, streamed: bool, strict: bool) -> None:
    wish = f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{NAMES[1]}">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    for text in ("No.", wish) if strict else (wish,):
        server.model.reply = reply_of(thinking, text if thinking else text.partition("tool_calls>\n")[2] or text)
        for choice in ("required", {"type": "function", "function": {"name": "erase"}}):
            one = {"parallel_tool_calls": False}
            content, calls, reason = chat(
                server, streamed, thinking, tools=functions(strict), tool_choice=choice, **one
            )
            assert (content, len(calls), reason) == ("", 1, "tool_calls")
            assert calls[0][0] in (NAMES if choice == "required" else NAMES[1:])
            if strict:
                jsonschema.validate(calls[0][1], COLOR)
        one = {"disable_parallel_tool_use": True}
        for choice in ({"type": "any", **one}, {"type": "tool", "name": "erase", **one}):
            opened = choice["type"] == "tool" and not thinking  # the prompt ends inside the block
            server.model.reply = reply_of(thinking, text.partition("tool_calls>\n")[2] or text if opened else text)
            content, calls, reason = messages(server, streamed, thinking, tools=tools(strict), tool_choice=choice)
            assert (content, len(calls), reason) == ("", 1, "tool_use")
            assert calls[0][0] in (NAMES if choice["type"] == "any" else NAMES[1:])
            if strict:
                jsonschema.validate(calls[0][1], COLOR)


@STREAMED
def test_several_calls_unless_the_request_wants_one(server, streamed: bool) -> None:
    calls = "".join(
        f'<｜DSML｜invoke name="{name}">\n<｜DSML｜parameter name="color" string="true">red</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">22</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        for name in NAMES
    )
    server.model.reply = f"</think>\n\n<｜DSML｜tool_calls>\n{calls}</｜DSML｜tool_calls>"
    for strict in (True, False):
        _, found, _ = chat(server, streamed, True, tools=functions(strict))
        assert found == [(name, {"color": "red", "n": 22}) for name in NAMES]
        _, found, _ = chat(server, streamed, True, tools=functions(strict), parallel_tool_calls=False)
        assert found == [("paint", {"color": "red", "n": 22})]
        _, found, _ = messages(server, streamed, True, tools=tools(strict), tool_choice=ONE)
        assert found == [("paint", {"color": "red", "n": 22})]


@STREAMED
def test_a_strict_tool_is_called_right_or_not_at_all(server, streamed: bool) -> None:
    server.model.reply = (
        '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="paint">\n'
        '<｜DSML｜parameter name="color" string="true">green</｜DSML｜parameter>\n'
    )
    for _, calls, _ in (
        chat(server, streamed, True, tools=functions(True), parallel_tool_calls=False),
        messages(server, streamed, True, tools=tools(True), tool_choice=ONE),
    ):
        ((_, arguments),) = calls
        jsonschema.validate(arguments, COLOR)
    server.model.reply = "</think>No call."
    assert chat(server, streamed, True, tools=functions(True)) == ("No call.", [], "stop")
    assert messages(server, streamed, True, tools=tools(True)) == ("No call.", [], "end_turn")


@THINKING
@STREAMED
def test_no_call_where_none_may_be(server, thinking: bool, streamed: bool) -> None:
    server.model.reply = reply_of(thinking, OTHER_REPLIES[2].removeprefix("</think>"))
    content, calls, _ = chat(server, streamed, thinking, tools=functions(False), tool_choice="none", max_tokens=50)
    assert not calls and "DSML" not in content
    content, calls, _ = messages(
        server, streamed, thinking, tools=tools(False), tool_choice={"type": "none"}, max_tokens=50
    )
    assert not calls and "DSML" not in content


def test_json_or_a_call(server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR}}
    server.model.reply = '</think>{"color": "red", "n": 1}'
    content, calls, _ = chat(server, False, True, tools=functions(False), response_format=form)
    assert json.loads(content) == {"color": "red", "n": 1} and not calls
    server.model.reply = (
        '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="erase">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    content, calls, _ = chat(server, False, True, tools=functions(False), response_format=form)
    assert (content, calls) == ("", [("erase", {})])


@STREAMED
def test_json_or_a_call_of_a_strict_tool(server, streamed: bool) -> None:
    """deepseek-recipe refuses a form beside strict tools; both are enforced."""
    wrong = (
        '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="paint">\n'
        '<｜DSML｜parameter name="color" string="true">green</｜DSML｜parameter>\n'
    )
    right, other = '{"color": "red", "n": 22}', "</think>No."  # in whose place comes JSON or a call
    of_schema = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR}}
    for form in (of_schema, {"type": "json_object"}):
        asked = {"tools": functions(True), "parallel_tool_calls": False, "response_format": form}
        server.model.reply = "</think>" + right
        content, calls, _ = chat(server, streamed, True, **asked)
        assert (content.replace(" ", ""), calls) == (right.replace(" ", ""), [])
        for reply in (wrong, other) if form is of_schema else (wrong,):
            server.model.reply = reply
            content, calls, _ = chat(server, streamed, True, **asked)
            jsonschema.validate(calls[0][1] if calls else json.loads(content), COLOR)
            assert calls or reply == other
    tool = {"type": "function", "name": "paint", "parameters": COLOR, "strict": True}
    text = {"format": {"type": "json_schema", "name": "color", "schema": COLOR}}
    for reply in (wrong, other):
        server.model.reply = reply
        response = output(server, streamed, input="json", tools=[tool], text=text, parallel_tool_calls=False)
        assert response.tools[0].strict is True
        last = response.output[-1]
        called = last.type == "function_call"
        jsonschema.validate(json.loads(last.arguments if called else response.output_text), COLOR)
        assert called or reply == other


def test_thinking_does_not_end_the_answer(server) -> None:
    server.model.reply = "I think"  # and then the end of the sentence, for ever
    _, calls, reason = chat(server, False, True, tools=functions(True), tool_choice="required", max_tokens=40)
    assert (calls, reason) == ([], "length") or calls


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}}},
         "response_format", "Invalid schema for response_format: .*uniqueItems"),
        ({"response_format": {"type": "regex", "regex": "(?=a)"}}, "response_format", "look-ahead"),
        ({"response_format": {"type": "regex", "regex": "a"}, "tools": functions(False)}, "response_format",
         "beside tools"),
        ({"response_format": {"type": "regex", "regex": "a"},
          "messages": [USER, {"role": "assistant", "content": "{", "prefix": True}]}, "response_format", "continues"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
          "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "no function named 'g'"),
        ({"tool_choice": "required"}, "tool_choice", "offered no tool"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "offered no tool"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_had_is_refused(server, options: dict[str, Any], place: str | None, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        chat(server, False, False, **options)
    assert place is None or error.value.param == place


@THINKING
def test_a_form_that_says_nothing_or_is_empty_is_refused(server, thinking: bool) -> None:
    """A schema of true or false, which deepseek-recipe accepts, and a regex without a character."""
    forms = [{"type": "json_schema", "json_schema": {"name": "a", "schema": schema}} for schema in (True, False)]
    for form, words in zip([*forms, {"type": "regex", "regex": ""}], ("true", "false", "''"), strict=True):
        with pytest.raises(openai.BadRequestError, match=f"for response_format: {words}; allowed") as error:
            chat(server, False, thinking, response_format=form)
        assert error.value.param == "response_format"
    for schema in (True, False):
        form = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
        effort = {"effort": "high" if thinking else "none"}
        asked = {"model": "tiny", "input": "Give me json.", "text": form, "reasoning": effort}
        refused = server.http().post("/v1/responses", json=asked)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "text.format", refused.text


def test_a_form_that_messages_cannot_have_is_refused(server) -> None:
    with pytest.raises(anthropic.BadRequestError, match="Invalid schema for output_config.format: .*uniqueItems"):
        messages(
            server, False, True, output_config={"format": {"type": "json_schema", "schema": {"uniqueItems": True}}}
        )
    bad = [{"name": "f", "strict": True, "input_schema": {"type": "object", "allOf": [{"type": "object"}]}}]
    with pytest.raises(anthropic.BadRequestError, match="Invalid schema for tools: tool 'f': .*'allOf'") as error:
        messages(server, True, True, tools=bad)
    assert error.value.body["error"]["param"] == "tools"


@STREAMED
def test_an_answer_that_its_constraint_cannot_follow_is_an_error(server, streamed: bool, monkeypatch) -> None:
    advance, taken = Constraint.advance, Counter[Constraint]()

    def fail(self: Constraint, token_id: int) -> None:
        advance(self, token_id)
        taken[self] += 1
        if taken[self] > 9:
            self._place.error = "a limit"

    monkeypatch.setattr(Constraint, "advance", fail)
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR}}
    server.model.reply = '</think>{"color": "blue", "n": 22}'
    with pytest.raises(openai.APIError, match="too complex to be followed"):
        chat(server, streamed, True, response_format=form)
    with pytest.raises(anthropic.APIError, match="too complex to be followed"):
        messages(server, streamed, True, output_config={"format": {"type": "json_schema", "schema": COLOR}})


def test_prefixes_are_shared_as_configured(server) -> None:
    def salt(sharing: str, key: str | None, wire_format: WireFormat = CHAT, **fields: Any) -> str | None:
        service = ChatService(ServedModels([ServedModel.of(server.engine)]), sharing)
        body = {"model": "tiny", "messages": [USER], "max_tokens": 5} | fields
        return service.prepare(wire_format, json.dumps(body).encode(), key).turn.params.cache_salt

    assert salt("all", "k", user_id="a") is None
    assert salt("all", "k", cache_salt="x") == salt("all", "q", cache_salt="x") != salt("all", "k", cache_salt="y")
    assert salt("key", "k") == salt("key", "k", user_id="a") != salt("key", "q")
    assert salt("user", "k", user_id="a") == salt("user", "k", MESSAGES, metadata={"user_id": "a"})
    assert salt("user", "k", user_id="a") != salt("user", "k", user="b") != salt("user", "k")
    with pytest.raises(openai.BadRequestError, match="Invalid cache_salt value 5") as error:
        chat(server, False, True, extra_body={"cache_salt": 5})
    assert error.value.param == "cache_salt"


def test_the_key_of_a_request_reaches_its_prefixes(serve, model, monkeypatch) -> None:
    salts: list[tuple[Any, ...]] = []
    monkeypatch.setattr("dsv4.server.service.cache_salt", lambda *parts: salts.append(parts))
    with serve(model, share_prefixes="key", api_keys=["secret"]) as served:
        served.key = "secret"
        chat(served, False, True)
    assert salts == [("key", "secret", None, None)]


def test_salts_tell_keys_and_users_apart() -> None:
    assert cache_salt("all", "key", "user", None) is None
    salts = {cache_salt("user", key, user, salt) for key in "ab" for user in ("u", None) for salt in ("s", None)}
    assert len(salts) == 8 and all(salt is not None and len(salt) == 64 for salt in salts), "no key can be read in one"
