import json

import anthropic
import pytest

from dsv4.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "name": "weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = (
    'I look it up.</think>Wait.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
NO_THINKING = {"thinking": {"type": "disabled"}}


def ask(server, **options):
    options = {"model": "tiny", "max_tokens": 500, "messages": QUESTION} | options
    return server.anthropic().messages.create(**options)


def stream(server, **options):
    options = {"model": "tiny", "max_tokens": 500, "messages": QUESTION} | options
    with server.anthropic().messages.stream(**options) as events:
        return list(events), events.get_final_message()


def test_thinking_and_text_are_blocks_with_a_signature_and_usage(server) -> None:
    server.model.reply = "easy</think>Paris."
    message = ask(server)
    assert [(block.type) for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("easy", "Paris.")
    assert message.content[0].signature == message.id
    assert (message.stop_reason, message.model, message.role) == ("end_turn", "tiny", "assistant")
    sampled = len(server.model.tokenizer.encode(server.model.reply)) + 1
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len(server.model.prompts[0]), sampled)


def test_a_stream_comes_token_by_token_in_two_blocks(server) -> None:
    server.model.reply = "easy</think>Paris é."
    events, message = stream(server)
    assert (message.content[0].thinking, message.content[1].text) == ("easy", "Paris é.")
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert kinds.count("text") >= 6, "one event a token, not one blob"
    assert events[0].message.usage.input_tokens == len(server.model.prompts[0])
    assert message.usage.output_tokens == len(server.model.tokenizer.encode(server.model.reply)) + 1


def test_the_raw_stream_names_its_events_and_pings_once_after_the_first_block(server) -> None:
    body = {"model": "tiny", "max_tokens": 50, "messages": QUESTION, "stream": True}
    response = server.http().post("/v1/messages?beta=true", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in response.text.split("\n\n") if frame]
    assert all(frame[0].startswith("event: ") and frame[1].startswith("data: ") for frame in frames)
    assert all(json.loads(frame[1][6:])["type"] == frame[0][7:] for frame in frames)
    assert [frame[0][7:] for frame in frames[:3]] == ["message_start", "content_block_start", "ping"]
    assert json.loads(frames[1][1][6:])["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert "[DONE]" not in response.text


def test_a_tool_call_is_a_block_and_its_result_is_answered(server) -> None:
    server.model.reply = CALL
    message = ask(server, tools=[WEATHER])
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.stop_reason == "tool_use"
    assert (message.content[2].name, message.content[2].input) == ("weather", {"city": "Oslo"})
    server.model.reply = "sunny</think>Sunny."
    result = {"type": "tool_result", "tool_use_id": message.content[2].id, "content": "sun"}
    history = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert ask(server, tools=[WEATHER], messages=history).content[1].text == "Sunny."


def test_a_streamed_tool_call_has_its_input_in_pieces(server) -> None:
    server.model.reply = CALL
    events, message = stream(server, tools=[WEATHER])
    assert message.content[2].input == {"city": "Oslo"}
    pieces = [event.partial_json for event in events if event.type == "input_json"]
    assert json.loads("".join(pieces)) == {"city": "Oslo"} and len(pieces) > 4


def test_a_stop_sequence_is_named(server) -> None:
    server.model.reply = "</think>one END two"
    message = ask(server, stop_sequences=["END"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    assert message.content[-1].text == "one "


def test_max_tokens_is_the_stop_reason(server) -> None:
    server.model.reply = "abcdef</think>ghijkl"
    message = ask(server, max_tokens=3)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)
    assert [block.type for block in message.content] == ["thinking"]


def test_without_thinking_an_answer_is_text_or_nothing(server) -> None:
    server.model.reply = "Paris."
    assert [block.type for block in ask(server, **NO_THINKING).content] == ["text"]
    server.model.reply = ""
    message = ask(server, **NO_THINKING)
    assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "end_turn", 1)


def test_count_tokens_equals_what_the_message_is_billed(server) -> None:
    client = server.anthropic()
    options = {"model": "tiny", "messages": QUESTION, "system": "Be brief.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**options).input_tokens
    assert counted == client.messages.create(max_tokens=50, **options).usage.input_tokens
    assert counted > client.messages.count_tokens(model="tiny", messages=QUESTION).input_tokens
    for base in ("/v1", "/anthropic/v1", "/anthropic"):
        plain = server.http().post(f"{base}/messages/count_tokens", json={"model": "tiny", "messages": QUESTION})
        assert plain.status_code == 200 and set(plain.json()) == {"input_tokens"}


def test_what_claude_code_sends_is_accepted(server, folder) -> None:
    server.model.reply = "</think>ok"
    body = {
        "model": "claude-sonnet-4-5[1m]",
        "max_tokens": 32000,
        "stream": False,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": []},
        "metadata": {"user_id": '{"device": 1}'},
        "tools": [
            {**WEATHER, "type": "custom", "eager_input_streaming": True},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "zzz"}]},
            {"role": "user", "content": "go on"},
            {"role": "system", "content": "A reminder."},
        ],
    }
    headers = {"anthropic-beta": "claude-code-20250219,made-up-2031-01-01", "anthropic-version": "2023-06-01"}
    response = server.http().post("/v1/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == "claude-sonnet-4-5"
    decoded = Tokenizer.from_pretrained(folder).decode(server.model.prompts[0])
    assert "You are an agent." in decoded and "billing-header" not in decoded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt-4"}, "you passed gpt-4"),
        ({"messages": []}, "at least one message is required"),
        ({"stop_sequences": ["x"] * 17}, "17"),
        ({"tools": [WEATHER | {"strict": "yes"}]}, r"Invalid tools\[0\].strict value 'yes'"),
    ],
)
def test_errors_have_both_shapes(server, change, message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as error:
        ask(server, **change)
    body = error.value.body
    assert body["type"] == "error"
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_malformed_calls_are_the_same_streamed_and_whole(server) -> None:
    """Faults were: JSON in an invoke became a call with an empty input, an integer beyond 64 bits a float."""
    mark, big = "｜DSML｜", 123456789012345678901234567890
    for body, wanted in ((f'{{"days": {big}}}', {"days": big}), ('{"arguments": {"city": "Oslo"}}', {"city": "Oslo"})):
        server.model.reply = f'</think><{mark}tool_calls>\n<{mark}invoke name="weather">{body}</{mark}invoke>'
        whole = ask(server, tools=[WEATHER])
        _, streamed = stream(server, tools=[WEATHER])
        for message in (whole, streamed):
            (call,) = [part for part in message.content if part.type == "tool_use"]
            assert call.input == wanted and message.stop_reason == "tool_use"


def test_markup_that_is_no_call_is_text_without_tags(server) -> None:
    mark = "｜DSML｜"
    server.model.reply = f'</think><{mark}tool_calls>\n<{mark}invoke name="weather">do it</{mark}invoke>'
    for tools in ([WEATHER], []):
        message = ask(server, **({"tools": tools} if tools else {}))
        assert [part.text for part in message.content if part.type == "text"] == ["do it"]
        assert message.stop_reason == "end_turn"


def test_signatures_are_not_checked_and_thinking_is_told_apart(server) -> None:
    """Any signature is accepted; with thinking off nothing of it is asked for."""
    for signature in ("", "of another service", "x" * 5000):
        thinking = {"type": "thinking", "thinking": "EARLIER", "signature": signature}
        said = {"role": "assistant", "content": [thinking, {"type": "text", "text": "a"}]}
        for options in ({}, NO_THINKING):
            ask(server, messages=[*QUESTION, said, *QUESTION], tools=[WEATHER], **options)
            prompt = server.engine.llm.tokenizer.decode(server.model.prompts[-1])
            assert ("EARLIER" in prompt) is (options == {})
