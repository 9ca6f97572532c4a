"""Faults that users of other V4 servers reported, one test per fault."""

import json

import pytest

from dsv4.server.chat_completions import CHAT
from dsv4.server.messages import MESSAGES
from dsv4.server.served_models import ServedModel, ServedModels
from dsv4.server.service import ChatService
from dsv4.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = (
    "<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="true">{value}</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def ask(server, **options):
    answer = server.openai().chat.completions.create(model="tiny", **({"messages": QUESTION} | options))
    return answer.choices[0].message, answer.choices[0].finish_reason


def streamed(server, **options):
    chunks = server.openai().chat.completions.create(model="tiny", stream=True, **({"messages": QUESTION} | options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    arguments = "".join(call.function.arguments for delta in deltas for call in delta.tool_calls or [])
    return reasoning, content, arguments


def prompt(server, folder, number: int = -1) -> str:
    return Tokenizer.from_pretrained(folder).decode(server.model.prompts[number])


@pytest.mark.parametrize("before", ["t</think>", "t</think>\n\n", "t</think>Text.\n\n"])
def test_tool_markup_never_leaks_into_the_content(server, before: str) -> None:
    """The markup comes token by token, so every tag is split over events."""
    server.model.reply = before + CALL.format(value="v")
    expected = before.partition("</think>")[2].strip()
    reasoning, content, arguments = streamed(server, tools=[TOOL])
    assert (reasoning, content.strip(), json.loads(arguments)) == ("t", expected, {"x": "v"})


def test_a_tool_call_inside_unclosed_thinking_is_still_a_tool_call(server) -> None:
    server.model.reply = "let me see\n\n" + CALL.format(value="v")
    message, finish = ask(server, tools=[TOOL])
    assert (message.reasoning_content, message.content, finish) == ("let me see", "", "tool_calls")
    assert json.loads(message.tool_calls[0].function.arguments) == {"x": "v"}


MALFORMED = (
    ('{"x": "v"}', {"x": "v"}),
    ('<｜DSML｜parameter name="x">v</｜DSML｜parameter>', {"x": "v"}),
    ('<｜DSML｜parameter name="arguments" string="false">{"x": 7}</｜DSML｜parameter>', {"x": 7}),
    ('<｜DSML｜parameter name="x" string="false">three</｜DSML｜parameter>', {"x": "three"}),
    ('{"x": "\\ud83d"}', {"x": "\ufffd"}),
)


@pytest.mark.parametrize("before", ["t", "t</think>"], ids=["unclosed thinking", "answer"])
@pytest.mark.parametrize(("body", "arguments"), MALFORMED)
def test_malformed_calls_are_parsed_in_thinking_too_and_alike_everywhere(server, before, body, arguments) -> None:
    """In both protocols, streamed and whole; the fault was an empty input, invalid JSON, or a 500."""
    invoke = f'<｜DSML｜invoke name="f">\n{body}\n</｜DSML｜invoke>'
    server.model.reply = f"{before}\n\n<｜DSML｜tool_calls>\n{invoke}\n</｜DSML｜tool_calls>"
    tool = {**TOOL["function"], "parameters": {"type": "object", "properties": {"x": {}}}}
    tools = [{"type": "function", "function": tool}]
    message, finish = ask(server, tools=tools)
    assert (message.reasoning_content, message.content, finish) == ("t", "", "tool_calls")
    assert json.loads(message.tool_calls[0].function.arguments) == arguments
    assert json.loads(streamed(server, tools=tools)[2]) == arguments
    request = {
        "model": "tiny",
        "max_tokens": 900,
        "messages": QUESTION,
        "tools": [{"name": "f", "input_schema": tool["parameters"]}],
    }
    whole = server.anthropic().messages.create(**request)
    assert [block.type for block in whole.content] == ["thinking", "tool_use"] and whole.stop_reason == "tool_use"
    assert whole.content[1].input == arguments
    with server.anthropic().messages.stream(**request) as events:
        assert events.get_final_message().content[1].input == arguments


def test_a_mark_in_an_answer_takes_nothing_else_away(server) -> None:
    server.model.reply = "t</think>The mark <｜DSML｜ begins a call; x > y. The end."
    for options in ({}, {"tools": [TOOL]}):
        assert ask(server, **options)[0].content == "The mark  begins a call; x > y. The end."


def test_no_tags_are_shown_in_thinking_without_tools(server) -> None:
    server.model.reply = "so\n\n" + CALL.format(value="v")
    message, finish = ask(server)
    assert (message.reasoning_content, message.content, finish) == ('so\n\nf({"x": "v"})', "", "stop")


def test_text_that_only_looks_like_the_beginning_of_tool_markup_is_shown(server) -> None:
    server.model.reply = "</think>a < b, <｜"
    assert ask(server, tools=[TOOL])[0].content == "a < b, <｜"


def test_arguments_may_hold_anything_but_their_own_end(server) -> None:
    value = 'quotes " and \\ and </think> and {"json": 1}\nline'
    server.model.reply = "</think>" + CALL.format(value=value)
    message, _ = ask(server, tools=[TOOL])
    assert json.loads(message.tool_calls[0].function.arguments) == {"x": value}


def test_two_calls_in_a_turn_have_two_ids_and_indices(server) -> None:
    one = CALL.format(value="1")
    invoke = one[one.index("<｜DSML｜invoke") : one.index("</｜DSML｜tool_calls>")]
    server.model.reply = "</think>" + one.replace(invoke, invoke + invoke.replace(">1<", ">2<"))
    message, _ = ask(server, tools=[TOOL])
    assert [json.loads(call.function.arguments)["x"] for call in message.tool_calls] == ["1", "2"]
    assert len({call.id for call in message.tool_calls}) == 2


def test_the_end_of_sentence_token_never_shows(server) -> None:
    for reply in ("thinking only", "t</think>answer", "t</think>"):
        server.model.reply = reply
        message, _ = ask(server)
        assert "end▁of" not in message.content + message.reasoning_content


def test_without_the_end_of_thinking_everything_is_reasoning(server) -> None:
    server.model.reply = "I never stop"
    message, finish = ask(server)
    assert (message.reasoning_content, message.content, finish) == ("I never stop", "", "stop")


def test_a_stray_end_of_thinking_in_the_answer_is_dropped(server) -> None:
    server.model.reply = "t</think>one</think>two"
    assert ask(server)[0].content == "onetwo"


def test_tool_choice_none_leaves_the_tools_out_of_the_prompt(server, folder) -> None:
    ask(server, tools=[TOOL], tool_choice="none")
    ask(server)
    assert prompt(server, folder, 0) == prompt(server, folder, 1)


def test_a_named_tool_choice_does_not_leak_markup(server) -> None:
    server.model.reply = CALL.format(value="v").partition("tool_calls>\n")[2]
    choice = {"type": "function", "function": {"name": "f"}}
    off = {"thinking": {"type": "disabled"}}
    message, finish = ask(server, tools=[TOOL], tool_choice=choice, extra_body=off)
    assert (message.content, finish, message.tool_calls[0].function.name) == ("", "tool_calls", "f")


def test_top_level_thinking_and_effort_are_honored(server, folder) -> None:
    ask(server, extra_body={"thinking": {"type": "disabled"}})
    ask(server, reasoning_effort="none")
    assert prompt(server, folder, 0) == prompt(server, folder, 1)
    assert prompt(server, folder).endswith("</think>")


def test_thinking_blocks_carry_a_signature_even_when_streamed(server) -> None:
    server.model.reply = "t</think>a"
    body = {"model": "tiny", "messages": QUESTION, "stream": True}
    frames = server.http().post("/v1/messages", json=body).text
    assert '"content_block":{"type":"thinking","thinking":"","signature":""}' in frames
    assert '"type":"signature_delta"' in frames


def test_a_trailing_system_message_is_not_an_error(server, folder) -> None:
    messages = [*QUESTION, {"role": "system", "content": "Be kind."}]
    ask(server, messages=messages)
    assert "Be kind." in prompt(server, folder)
    response = server.http().post("/v1/messages", json={"model": "tiny", "messages": messages})
    assert response.status_code == 200 and "Be kind." in prompt(server, folder)


def test_history_without_reasoning_is_accepted_where_tools_were_used(server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
    ]
    assert ask(server, messages=history, tools=[TOOL])[1] == "stop"


def test_earlier_thinking_stays_only_where_tools_are_used(server, folder) -> None:
    history = [*QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "OLD"}, *QUESTION]
    ask(server, messages=history)
    assert "OLD" not in prompt(server, folder)
    ask(server, messages=history, tools=[TOOL])
    assert "OLD" in prompt(server, folder)


def test_sampling_parameters_count_without_thinking_and_are_fixed_with_it(server) -> None:
    service = ChatService(ServedModels([ServedModel.of(server.engine)]))
    request = {"model": "tiny", "messages": QUESTION, "temperature": 0.2, "top_p": 0.5, "seed": 9, "max_tokens": 7}
    thinking = service.prepare(CHAT, json.dumps(request).encode()).turn.params
    assert (thinking.temperature, thinking.top_p, thinking.seed, thinking.max_tokens) == (1.0, 1.0, 9, 7)
    plain = service.prepare(CHAT, json.dumps(request | {"thinking": {"type": "disabled"}}).encode()).turn.params
    assert (plain.temperature, plain.top_p) == pytest.approx((0.2, 0.5))


def test_max_tokens_without_a_request_follows_thinking_and_the_room_left(server) -> None:
    service = ChatService(ServedModels([ServedModel.of(server.engine)]))

    def resolved(protocol, **request) -> tuple[int, int]:
        turn = service.prepare(protocol, json.dumps({"model": "tiny", "messages": QUESTION} | request).encode()).turn
        return turn.params.max_tokens, len(turn.prompt_token_ids)

    assert resolved(CHAT, thinking={"type": "disabled"})[0] == 8192
    limit, prompt_tokens = resolved(MESSAGES, thinking={"type": "enabled"})
    assert limit == 65536 - prompt_tokens, "65536 would go past the context"
