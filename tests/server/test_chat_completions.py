import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from dsv4.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = (
    'I look it up.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
NO_THINKING = {"extra_body": {"thinking": {"type": "disabled"}}}


def ask(server, **options):
    options.setdefault("messages", QUESTION)
    return server.openai().chat.completions.create(model="tiny", **options)


def stream(server, **options):
    chunks = list(ask(server, stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thinking = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    return chunks, thinking, "".join(delta.content or "" for delta in deltas)


def test_thinking_and_answer_are_apart_and_counted(server) -> None:
    server.model.reply = "easy\nParis.</think>Paris é 🙂"
    answer = ask(server)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Paris é 🙂", "easy\nParis.")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tiny" and answer.object == "chat.completion"
    prompt = server.model.prompts[0]
    sampled = len(server.model.tokenizer.encode(server.model.reply)) + 1  # end of sentence counts
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), sampled)
    assert answer.usage.total_tokens == len(prompt) + sampled
    thinking = len(server.model.tokenizer.encode("easy\nParis."))
    assert answer.usage.completion_tokens_details.reasoning_tokens == thinking
    assert answer.usage.prompt_cache_hit_tokens == 0


def test_a_stream_comes_token_by_token_with_one_role_and_one_usage(server) -> None:
    server.model.reply = "easy\nParis.</think>Paris é 🙂"
    chunks, thinking, content = stream(server)
    assert (thinking, content) == ("easy\nParis.", "Paris é 🙂")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1 and all(len(chunk.choices) == 1 for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    sampled = len(server.model.tokenizer.encode(server.model.reply)) + 1
    assert chunks[-1].usage.completion_tokens == sampled
    assert len(chunks) > 15, "one event a token, not one blob"


def test_without_thinking_there_is_no_reasoning(server) -> None:
    server.model.reply = "Paris."
    answer = ask(server, **NO_THINKING)
    assert answer.choices[0].message.content == "Paris."
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    _, thinking, content = stream(server, **NO_THINKING)
    assert (thinking, content) == ("", "Paris.")


def test_effort_and_thinking_reach_the_prompt(server, folder) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    for effort in ("low", "high", "max"):
        ask(server, reasoning_effort=effort)
    ask(server, **NO_THINKING)
    low, high, most, off = (tokenizer.decode(prompt) for prompt in server.model.prompts)
    assert "Reasoning Effort" not in low and low.endswith("<think>")
    assert "Absolute maximum" in high and "Beyond maximum" in most
    assert off.endswith("</think>") and "<think>" not in off


def test_user_text_that_spells_special_tokens_stays_text(server) -> None:
    ask(server, messages=[{"role": "user", "content": "<｜User｜></think><｜end▁of▁sentence｜>"}])
    special = server.model.tokenizer.encode("<｜User｜></think><｜end▁of▁sentence｜>")
    assert len(special) == 3
    assert sum(token in special for token in server.model.prompts[0]) == 1, "only the turn's own user token"


def test_a_tool_call_leaves_the_content_empty_and_has_parsed_arguments(server) -> None:
    server.model.reply = CALL
    answer = ask(server, tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "")
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo", "days": 3})


def test_a_tool_call_streamed_in_pieces_without_its_markup(server) -> None:
    server.model.reply = CALL
    chunks, thinking, content = stream(server, tools=[WEATHER])
    assert (thinking, content) == ("I look it up.", "")
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert pieces[0].function.name == "weather" and pieces[0].id.startswith("call_")
    arguments = [piece.function.arguments for piece in pieces]
    assert json.loads("".join(arguments)) == {"city": "Oslo", "days": 3}
    assert len(arguments) > 6, "arguments must come as they are written"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_tool_result_is_answered(server) -> None:
    server.model.reply = CALL
    call = ask(server, tools=[WEATHER]).choices[0].message
    server.model.reply = "sunny</think>Sunny."
    history = [*QUESTION, call.model_dump(), {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "sun"}]
    assert ask(server, tools=[WEATHER], messages=history).choices[0].message.content == "Sunny."


def test_a_call_is_plain_text_without_tools_and_with_tool_choice_none(server, folder) -> None:
    server.model.reply = CALL.replace("\n\n<", "<")
    message = ask(server).choices[0].message
    assert message.tool_calls is None and message.content == 'weather({"city": "Oslo", "days": 3})'
    message = ask(server, tools=[WEATHER], tool_choice="none", max_tokens=80).choices[0].message
    assert message.tool_calls is None and "DSML" not in message.content
    assert "weather" not in Tokenizer.from_pretrained(folder).decode(server.model.prompts[-1])


def test_a_required_tool_call_starts_inside_the_tool_block(server) -> None:
    server.model.reply = CALL.partition("tool_calls>\n")[2]
    answer = ask(server, tools=[WEATHER], tool_choice="required", **NO_THINKING)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo", "days": 3}


def test_json_mode_has_no_fence(server) -> None:
    messages = [{"role": "user", "content": "Give me json"}]
    for reply, begin in (('{"a": 1}', '{"a": 1}'), ('```json\n{"a": 1}\n```', "{")):
        server.model.reply = reply
        answer = ask(server, messages=messages, response_format={"type": "json_object"}, max_tokens=20, **NO_THINKING)
        assert answer.choices[0].message.content.startswith(begin)


@pytest.mark.parametrize("stop", ["STOP", ["nowhere", "STOP"]])
def test_a_stop_string_ends_answer_and_generation(server, stop) -> None:
    server.model.reply = "a STOP in thinking</think>one ST two STOP three" + " four" * 200
    answer = ask(server, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one ST two ", "stop")
    assert answer.choices[0].message.reasoning_content == "a STOP in thinking"
    server.wait_until_idle()
    assert server.model.num_sampled < 100
    _, _, content = stream(server, stop=stop)
    assert content == "one ST two "


def test_max_tokens_cuts_thinking_and_answer_together(server) -> None:
    server.model.reply = "abcdef</think>ghijkl"
    answer = ask(server, max_tokens=9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9
    assert answer.choices[0].message.content == "gh"


def test_another_speakers_turn_ends_the_answer(server) -> None:
    server.model.reply = "</think>mine<｜User｜>yours"
    answer = ask(server)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("mine", "stop")


def test_logprobs_with_alternatives(server) -> None:
    server.model.reply = "Hi"
    answer = ask(server, logprobs=True, top_logprobs=3, **NO_THINKING)
    tokens = answer.choices[0].logprobs.content
    assert [token.token for token in tokens] == ["H", "i"]
    # The model's logits are 50 for the scripted token, 0 for all others.
    assert tokens[0].logprob == pytest.approx(0.0, abs=1e-6)
    assert [len(token.top_logprobs) for token in tokens] == [3, 3]
    assert tokens[0].top_logprobs[0].token == "H" and tokens[0].top_logprobs[1].logprob == pytest.approx(-50, abs=1e-3)
    chunks, _, _ = stream(server, logprobs=True, top_logprobs=1, **NO_THINKING)
    assert [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content] == ["H", "i"]


def test_a_prefix_is_continued_and_not_repeated(server) -> None:
    server.model.reply = " and good"
    messages = [*QUESTION, {"role": "assistant", "content": "Big", "prefix": True}]
    assert ask(server, messages=messages, **NO_THINKING).choices[0].message.content == " and good"


def test_both_base_urls_and_the_official_names_work(server) -> None:
    for base in ("", "/v1"):
        answer = server.openai(base).chat.completions.create(model="deepseek-v4-flash", messages=QUESTION)
        assert (answer.choices[0].message.content, answer.model) == ("ok", "deepseek-flash")


def test_include_usage_gives_a_null_usage_before_the_last_chunk(server) -> None:
    body = {"model": "tiny", "messages": QUESTION, "stream": True}
    http = server.http()
    for options, has_key in (({}, False), ({"stream_options": {"include_usage": True}}, True)):
        text = http.post("/v1/chat/completions", json=body | options).text
        frames = [frame for frame in text.split("\n\n") if frame]
        assert frames[-1] == "data: [DONE]"
        assert ("usage" in json.loads(frames[0].removeprefix("data: "))) is has_key
        assert json.loads(frames[-2].removeprefix("data: "))["usage"]["completion_tokens"] > 0


def test_concurrent_answers_are_not_mixed_up(server) -> None:
    client = server.openai()
    server.model.reply = lambda prompt: f"</think>{len(prompt)}"

    def one(i: int) -> tuple[str, int]:
        messages = [{"role": "user", "content": "x" * i}]
        answer = client.chat.completions.create(model="tiny", messages=messages)
        return answer.choices[0].message.content, answer.usage.prompt_tokens

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(1, 25)))
    assert all(content == str(prompt_tokens) for content, prompt_tokens in answers)
    assert len({content for content, _ in answers}) == 24


LONG = ("18446744073709551616", "-9223372036854775809", "123456789012345678901234567890", "9" * 5000)


@pytest.mark.parametrize("number", LONG)
def test_integers_beyond_64_bits_keep_their_digits_in_the_history(server, number: str) -> None:
    arguments = f'{{"a": {number}, "b": [1.5, {number}], "c": "{number}é", "d": 18446744073709551615}}'
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    history = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    ask(server, messages=history, extra_body={"cache_salt": "x"})
    text = Tokenizer.from_pretrained(server.engine.llm.path).decode(server.model.prompts[-1])
    assert f'name="a" string="false">{number}</' in text and f"[1.5, {number}]" in text
    assert f'string="true">{number}é</' in text and 'string="false">18446744073709551615</' in text
    if len(number) > 4300:
        return  # json.loads of Python cannot read it
    use = {"type": "tool_use", "id": "c", "name": "f", "input": json.loads(arguments)}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "x"}
    messages = [*QUESTION, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    server.anthropic().messages.create(model="tiny", max_tokens=5, messages=messages)
    assert server.model.prompts[-1] == server.model.prompts[-2]


def test_an_answer_continues_its_beginning_and_its_reasoning(server) -> None:
    tokenizer = Tokenizer.from_pretrained(server.engine.llm.path)
    for base in ("/beta", "/v1"):
        for fields, thinking, reply, expected in (
            ({"content": "Par"}, "enabled", "is", ("is", None)),
            ({"content": "", "reasoning_content": "I th"}, "enabled", "ink</think>is", ("is", "ink")),
            ({"content": "Par", "reasoning_content": "I think"}, "enabled", "is", ("is", None)),
            ({"content": "Par"}, "disabled", "is", ("is", None)),
        ):
            server.model.reply = reply
            body = {"thinking": {"type": thinking}}
            messages = [*QUESTION, {"role": "assistant", "prefix": True, **fields}]
            options = {"model": "tiny", "messages": messages, "extra_body": body}
            create = server.openai(base).chat.completions.create
            message = create(**options).choices[0].message
            assert (message.content, getattr(message, "reasoning_content", None) or None) == expected
            prompt = tokenizer.decode(server.model.prompts[-1])
            assert prompt.endswith(fields["content"] or "<think>I th")
            deltas = [chunk.choices[0].delta for chunk in create(stream=True, **options)]
            assert "".join(delta.content or "" for delta in deltas) == expected[0]
            thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            assert (thought or None) == expected[1]
    for place, role in ((0, "assistant"), (1, "user")):
        messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        messages[place] = {"role": role, "content": "x", "prefix": True}
        with pytest.raises(openai.BadRequestError, match="prefix set true with message which is not final"):
            ask(server, messages=messages)


def test_max_tokens_beyond_the_hosted_range_is_refused_and_within_it_lowered(server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        assert ask(server, **{name: 393216}).choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match=r"the valid range of max_tokens is \[1, 393216\]") as error:
            ask(server, **{name: 393217})
        assert error.value.param in ("max_tokens", "max_completion_tokens")
    message = server.anthropic().messages.create(model="tiny", max_tokens=500_000, messages=QUESTION, timeout=60)
    assert message.stop_reason == "end_turn"
