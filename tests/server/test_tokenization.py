"""/tokenize and /detokenize in vLLM's shapes."""

from __future__ import annotations

import json

import pytest

from dsv4.tokenizer.special import BOS

from .responses_api import markup

USER = {"role": "user", "content": "the cat é"}


def post(server, path: str, **body):
    response = server.http().post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    return response.status_code, response.json()


@pytest.mark.parametrize("base", ["", "/v1"])
def test_a_prompt_and_back(server, base: str) -> None:
    tokenizer = server.engine.llm.tokenizer
    ids = tokenizer.encode("the cat é<｜User｜>")
    status, answer = post(server, base + "/tokenize", model="tiny", prompt="the cat é<｜User｜>")
    assert status == 200
    limit = server.engine.llm.max_model_len
    assert answer == {"count": len(ids) + 1, "max_model_len": limit, "tokens": [0, *ids], "token_strs": None}
    plain = post(server, base + "/tokenize", prompt="cat", add_special_tokens=False, return_token_strs=True)[1]
    assert plain["tokens"] == tokenizer.encode("cat") and "".join(plain["token_strs"]) == "cat"
    assert post(server, base + "/detokenize", tokens=answer["tokens"])[1] == {"prompt": BOS + "the cat é<｜User｜>"}
    assert post(server, base + "/detokenize", tokens=[])[1] == {"prompt": ""}


def test_messages_are_the_prompt_of_their_chat(server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for fields in (
        {},
        {"thinking": {"type": "disabled"}},
        {"tools": [tool]},
        {"chat_template_kwargs": {"thinking": False}},
        {"reasoning_effort": "max", "add_generation_prompt": True},
    ):
        extra = {key: value for key, value in fields.items() if key != "add_generation_prompt"}
        post(server, "/v1/chat/completions", model="tiny", messages=[USER], **extra)
        status, answer = post(server, "/tokenize", messages=[USER], **fields)
        assert (status, answer["tokens"]) == (200, server.model.prompts[-1])
        assert answer["count"] == len(answer["tokens"])


def test_messages_are_counted_with_the_turns_that_the_server_remembers(server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    server.model.reply = "I think.</think>" + markup("f")
    fields = {"model": "tiny", "tools": [tool]}
    _, called = post(server, "/v1/chat/completions", messages=[USER], **fields)
    (call,) = called["choices"][0]["message"]["tool_calls"]
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}  # its reasoning is not sent back
    messages = [USER, turn, {"role": "tool", "tool_call_id": call["id"], "content": "4"}]
    post(server, "/v1/chat/completions", messages=messages, **fields)
    read = server.model.prompts[-1]
    status, answer = post(server, "/tokenize", messages=messages, **fields)
    assert (status, answer["tokens"]) == (200, read)
    assert "I think." in server.engine.llm.tokenizer.decode(read)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "prompt", "a valid string"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt", "no text"),
        ("/tokenize", {"messages": [{"role": "nobody"}]}, "messages[0].role", "nobody"),
        ("/tokenize", {"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt", "true"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template", "own prompt format"),
        ("/tokenize", {"model": "gpt", "prompt": "a"}, "model", "The supported API model names are"),
        ("/detokenize", {}, "tokens", "missing field `tokens`"),
        ("/detokenize", {"tokens": ["a"]}, "tokens", "a valid integer"),
        ("/detokenize", {"tokens": [5, 300]}, "tokens[1]", "token ids in [0, 299]"),
        ("/detokenize", {"tokens": [5, True]}, "tokens", "a valid integer"),
        ("/detokenize", {"tokens": [5] * 65537}, "tokens", "tokens has 65537 elements; allowed: 65536"),
        ("/tokenize", {"messages": [USER] * 50_001}, "messages", "messages has 50001 elements; allowed: 50000"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt", "true"),
    ],
)
def test_what_is_wrong_is_named(server, path: str, body: dict, param: str, words: str) -> None:
    status, answer = post(server, path, **body)
    assert status == 400 and words in answer["error"]["message"], answer
    assert answer["error"]["param"] == param
