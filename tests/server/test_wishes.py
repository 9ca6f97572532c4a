"""Content and options beyond plain text and sampling: honored or refused with a message, never silently ignored."""

import anthropic
import openai
import pytest

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
USER = {"role": "user", "content": "x"}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}
TEXT = {"type": "text", "media_type": "text/plain", "data": "The sky is green."}


def post(server, path: str, **change):
    return server.http().post(path, json={"model": "tiny", "max_tokens": 20, "messages": [USER]} | change)


def refused(server, path: str, **change) -> tuple[str, str]:
    response = post(server, path, **change)
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


def prompt(server) -> str:
    return server.engine.llm.tokenizer.decode(server.model.prompts[-1])


@pytest.mark.parametrize(
    ("kind", "noun"),
    [
        *(("image_url", "image"), ("input_image", "image"), ("file", "file"), ("input_file", "file")),
        *(("input_audio", "audio"), ("video_url", "video"), ("video", "video")),
    ],
)
def test_parts_that_the_model_cannot_see_are_refused_in_chat(server, kind: str, noun: str) -> None:
    parts = [{"type": "text", "text": "see:"}, {"type": kind, kind: {"url": "x", "data": "x"}}]
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message in (
        {"role": "user", "content": parts},
        {"role": "system", "content": parts},
        {"role": "tool", "tool_call_id": "a", "content": parts},
    ):
        history = [USER, {"role": "assistant", "tool_calls": [call]}, message]
        place, words = refused(server, CHAT, messages=history)
        assert place == "messages[2].content[1]"
        assert words == f"This model does not support {noun} ({place})"


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": PDF},
        {"type": "document", "source": PDF},
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        {"type": "document", "source": {"type": "file", "file_id": "a"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": PDF}]}},
        {"type": "document"},
        {"type": "container_upload", "file_id": "a"},
    ],
)
def test_blocks_that_the_model_cannot_see_are_refused_in_messages(server, block: dict) -> None:
    place, words = refused(server, MESSAGES, messages=[{"role": "user", "content": [USER | {"type": "text"}, block]}])
    assert place == "messages[0].content[1]" and words.startswith("This model does not support ") and place in words
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [block]}]}
    assert refused(server, MESSAGES, messages=[USER, use, result])[0] == "messages[2].content[0].content[0]"
    assert refused(server, MESSAGES, system=[{"type": "text", "text": "x"}, block])[0].startswith("system[1]")


def test_documents_of_text_are_read(server) -> None:
    parts = {"type": "content", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}
    blocks = [
        {"type": "document", "title": "Colors", "context": "of a far place", "source": TEXT},
        {"type": "document", "source": parts},
        {"type": "document", "source": {"type": "content", "content": "Three."}},
        {"type": "search_result", "source": "https://a", "title": "Found",
         "content": [{"type": "text", "text": "Four."}]},
        {"type": "text", "text": "What color?"},
    ]  # fmt: skip
    client = server.anthropic()
    client.messages.create(model="tiny", max_tokens=5, messages=[{"role": "user", "content": blocks}])
    expected = (
        "Colors\n\nof a far place\n\nThe sky is green.\n\nOne.\n\nTwo.\n\nThree.\n\nFound\n\nhttps://a\n\nFour.\n\n"
        "What color?"
    )
    assert expected in prompt(server)
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "document", "source": TEXT}]}
    messages = [USER, use, {"role": "user", "content": [result]}]
    client.messages.create(model="tiny", max_tokens=5, messages=messages)
    assert "The sky is green." in prompt(server)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_top_k_and_min_p_reach_the_sampler(server, monkeypatch, path: str) -> None:
    seen = []
    stream = server.engine.stream
    monkeypatch.setattr(
        server.engine, "stream", lambda ids, params, user: seen.append(params) or stream(ids, params, user)
    )
    for fields, expected in (
        ({"top_k": 5, "min_p": 0.25}, (5, 0.25)),
        ({"top_k": -1, "min_p": 0}, (0, 0.0)),
        ({"top_k": None, "min_p": None}, (0, 0.0)),
        ({"top_k": 2**70}, (2**70, 0.0)),
        ({}, (0, 0.0)),
    ):
        assert post(server, path, **fields).status_code == 200
        assert (seen[-1].top_k, seen[-1].min_p) == expected
    for name, value in (("top_k", -2), ("top_k", 1.5), ("top_k", "5"), ("top_k", True), ("min_p", 1.5), ("min_p", "x")):
        place, words = refused(server, path, **{name: value})
        assert place == name and f"Invalid {name} value {value!r}; allowed: " in words


def test_an_answer_that_ignores_the_end_has_max_tokens(server) -> None:
    server.model.reply = "</think>ok"
    for wish, tokens, reason in ((True, 9, "length"), (False, None, "stop")):
        answer = post(server, CHAT, max_tokens=9, ignore_eos=wish).json()
        assert answer["choices"][0]["finish_reason"] == reason
        assert tokens is None or answer["usage"]["completion_tokens"] == tokens
        assert answer["choices"][0]["message"]["content"] == "ok"
    assert refused(server, CHAT, ignore_eos=1) == ("ignore_eos", "Invalid ignore_eos value 1; allowed: true and false")


@pytest.mark.parametrize(
    "wish",
    [
        {"logit_bias": {"5": 10}},
        {"functions": [{"name": "f"}]},
        {"audio": {"voice": "a"}},
        {"modalities": ["text", "audio"]},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"regex": "a"}},
        {"repetition_penalty": 1.1},
        {"min_tokens": 5},
        {"use_beam_search": True},
        {"prompt_logprobs": 1},
        {"echo": True},
        {"include_stop_str_in_output": True},
        {"truncate_prompt_tokens": 5},
        {"continue_final_message": True},
        {"grammar": "root ::= x"},
        {"output_format": {"type": "json_schema", "schema": {}}},
        {"mirostat": 2},
        {"dry_multiplier": 0.8},
        {"xtc_probability": 0.5},
        {"repeat_penalty": 1.1},
        {"typ_p": 0.9},
        {"n_predict": 5},
        {"samplers": ["top_k", "temperature"]},
    ],
)
def test_unsupported_chat_parameters_are_refused(server, wish: dict) -> None:
    name = next(iter(wish))
    with pytest.raises(openai.BadRequestError, match=name) as error:
        server.openai().chat.completions.create(model="tiny", messages=[USER], extra_body=wish)
    assert error.value.param == name


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema", "schema": 5}}, "output_format"),
        ({"mcp_servers": [{"type": "url", "url": "https://a", "name": "a"}]}, "mcp_servers"),
        ({"container": "a"}, "container"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"stop": ["x"]}, "stop"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_unsupported_messages_parameters_are_refused(server, wish: dict, name: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=name) as error:
        server.anthropic().messages.create(model="tiny", max_tokens=5, messages=[USER], extra_body=wish)
    assert error.value.body["error"]["param"] == name


def test_neutral_values_ask_for_nothing(server) -> None:
    neutral = {"logit_bias": {}, "functions": [], "audio": None, "modalities": ["text"], "repetition_penalty": 1.0}
    neutral |= {"mirostat": 0, "dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1}
    neutral |= {
        "typ_p": 1,
        "dynatemp_range": 0,
        "repeat_penalty": 1,
        "top_n_sigma": -1,
        "n_predict": -1,
        "samplers": [],
    }
    ignored = {"presence_penalty": 1, "frequency_penalty": 1, "n": 1, "parallel_tool_calls": False, "unknown": 1}
    assert post(server, CHAT, **neutral, **ignored).status_code == 200
    config = {
        "output_config": {"effort": "low", "format": None},
        "mcp_servers": [],
        "response_format": {"type": "text"},
        "n": 1,
        "context_management": {"edits": []},
    }
    assert post(server, MESSAGES, **config).status_code == 200
