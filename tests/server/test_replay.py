"""The model's turns in later prompts: token for token as it wrote them, whatever clients make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dsv4.conversation.said_turns import SaidTurn, SaidTurns

DSML = "｜DSML｜"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number"}}}
QUESTION = "Weather in Oslo?"
NOTE = "Do it."


def call_markup(inner: str) -> str:
    return f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n{inner}\n</{DSML}invoke>\n</{DSML}tool_calls>'


CITY = f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>'
DAYS = f'<{DSML}parameter name="days" string="false">{{}}</{DSML}parameter>'
REPLIES = {
    "canonical": "I look\n it up.</think>" + call_markup(f"{CITY}\n{DAYS.format(3)}"),
    "other order": "Hm.</think>Wait." + call_markup(f"{DAYS.format('3.0')}\n{CITY}"),
    "spaces": "Hm.\n</think>\n\nWait. " + call_markup(f"\n  {CITY} {DAYS.format(' 3 ')}"),
    "JSON in an invoke": "Hm.</think>" + call_markup('{"days": 3,   "city": "Oslo"}'),
    "unclosed reasoning": "I look it up." + call_markup(f"{CITY}{DAYS.format(3)}"),
    "no end": "I.</think>" + call_markup(f"{CITY}{DAYS.format(3)}").removesuffix(f"\n</{DSML}tool_calls>"),
}


def rewritten(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as a client may write them again: in another order, with integral floats as integers."""
    ordered = dict(sorted(arguments.items(), reverse=True))
    return {name: int(value) if isinstance(value, float) else value for name, value in ordered.items()}


# Protocols: (server, history, streamed, thinking) -> (history as a forgetful client keeps it, usage)


def chat(
    server, history: list[Any], streamed: bool, thinking: bool, limit: int = 900
) -> tuple[list[Any], tuple[int, int, int]]:
    history = history or [{"role": "user", "content": QUESTION}]
    function = {"name": "weather", "parameters": SCHEMA}
    options = {"model": "tiny", "messages": history, "tools": [{"type": "function", "function": function}]}
    options["max_tokens"] = limit
    body = {"thinking": {"type": "enabled" if thinking else "disabled"}}
    create = server.openai().chat.completions.create
    if streamed:
        chunks = list(create(stream=True, extra_body=body, **options))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        pieces = [call for delta in deltas for call in delta.tool_calls or []]
        content, usage = "".join(delta.content or "" for delta in deltas), chunks[-1].usage
        found = [(p.id, p.function.name, "".join(q.function.arguments for q in pieces if q.index == p.index))
                 for p in pieces if p.id]  # fmt: skip
    else:
        answer = create(extra_body=body, **options)
        message, usage = answer.choices[0].message, answer.usage
        content = message.content
        found = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
    calls = [
        {"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(rewritten(json.loads(a)))}}
        for i, n, a in found
    ]
    said = {"role": "assistant", "content": content.strip()} | (
        {"content": content.strip() or None, "tool_calls": calls} if calls else {}
    )
    results = [{"role": "tool", "tool_call_id": i, "content": "sun"} for i, _, _ in found]
    counts = usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0, usage.completion_tokens
    return [*history, said, *(results or [{"role": "user", "content": NOTE}])], counts


def messages(
    server, history: list[Any], streamed: bool, thinking: bool, limit: int = 900
) -> tuple[list[Any], tuple[int, int, int]]:
    history = history or [{"role": "user", "content": QUESTION}]
    options = {"model": "tiny", "messages": history, "max_tokens": limit}
    options |= {"tools": [{"name": "weather", "input_schema": SCHEMA}]}
    options["thinking"] = {"type": "enabled", "budget_tokens": 1024} if thinking else {"type": "disabled"}
    client = server.anthropic()
    if streamed:
        with client.messages.stream(**options) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**options)
    said: list[Any] = [
        {"type": "text", "text": block.text} for block in message.content if block.type == "text" and block.text.strip()
    ]
    uses = [block for block in message.content if block.type == "tool_use"]
    said += [{"type": "tool_use", "id": use.id, "name": use.name, "input": rewritten(use.input)} for use in uses]
    said = said or [block.model_dump() for block in message.content]  # cut off while it was thinking
    results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sun"} for use in uses]
    usage = message.usage
    cached = usage.cache_read_input_tokens or 0
    following = {"role": "user", "content": results or NOTE}
    assert client.messages.count_tokens(**{k: v for k, v in options.items() if k != "max_tokens"}).input_tokens == (
        usage.input_tokens + cached
    )
    return [*history, {"role": "assistant", "content": said}, following], (
        usage.input_tokens + cached, cached, usage.output_tokens,
    )  # fmt: skip


def responses(
    server, history: list[Any], streamed: bool, thinking: bool, limit: int = 900
) -> tuple[list[Any], tuple[int, int, int]]:
    history = history or [{"type": "message", "role": "user", "content": QUESTION}]
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    options: dict[str, Any] = {"model": "tiny", "input": history, "tools": [tool], "store": False}
    options["max_output_tokens"] = limit
    options["reasoning"] = {"effort": "high" if thinking else "none"}
    create = server.openai().responses.create
    response = list(create(stream=True, **options))[-1].response if streamed else create(**options)
    said: list[Any] = []
    for item in response.output:
        if item.type == "message":
            said.append({"role": "assistant", "content": item.content[0].text})
        if item.type == "function_call":
            arguments = json.dumps(rewritten(json.loads(item.arguments)))
            said.append({"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": arguments})
    said = said or [item.model_dump(exclude_none=True) for item in response.output]  # cut off while it was thinking
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "sun"}
        for item in said
        if item.get("type") == "function_call"
    ]
    usage = response.usage
    following = results or [{"type": "message", "role": "user", "content": NOTE}]
    return [*history, *said, *following], (
        usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens,
    )  # fmt: skip


Protocol = Callable[..., tuple[list[Any], tuple[int, int, int]]]
PROTOCOLS = pytest.mark.parametrize("protocol", [chat, messages, responses])
STREAMED = pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])


def wrote(server) -> list[int]:
    """The last prompt and what the model wrote after it."""
    return server.model.prompts[-1] + server.model.tokenizer.encode(server.model.reply)


@PROTOCOLS
@STREAMED
@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_a_loop_of_calls_repeats_every_sampled_token(server, protocol: Protocol, streamed: bool, reply: str) -> None:
    """Without reasoning, arguments written anew: turn after turn the prompt begins with all that was computed."""
    history: list[Any] = []
    before: list[int] = []
    for turn in range(3):
        server.model.reply = reply
        history, _ = protocol(server, history, streamed, thinking=True)
        assert server.model.prompts[-1][: len(before)] == before, turn
        before = wrote(server)
    server.model.reply = "Enough.\n</think>\n\nIt is sunny.\n"
    history, _ = protocol(server, history, streamed, thinking=True)
    assert server.model.prompts[-1][: len(before)] == before
    before = wrote(server)
    protocol(server, history, streamed, thinking=True)
    assert server.model.prompts[-1][: len(before)] == before, "an answer without calls, too"


@PROTOCOLS
def test_without_thinking_the_sampled_tokens_are_repeated_too(server, protocol: Protocol) -> None:
    history: list[Any] = []
    for reply in (REPLIES["other order"].partition("</think>")[2], " It is \n sunny. ", "Bye."):
        server.model.reply = reply
        history, _ = protocol(server, history, False, thinking=False)
        before = wrote(server)
        server.model.reply = "ok"
        protocol(server, history, False, thinking=False)
        assert server.model.prompts[-1][: len(before)] == before


def test_a_forced_call_is_repeated_with_the_block_that_the_prompt_opened(server) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    options: dict[str, Any] = {"model": "tiny", "tools": [tool], "extra_body": {"thinking": {"type": "disabled"}}}
    question = {"role": "user", "content": QUESTION}
    server.model.reply = call_markup(f"{DAYS.format(3)}\n{CITY}").partition("tool_calls>\n")[2]
    create = server.openai().chat.completions.create
    message = create(messages=[question], tool_choice="required", **options).choices[0].message
    before = wrote(server)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    server.model.reply = "Sun."
    create(messages=[question, message.model_dump(exclude_none=True), result], **options)
    assert server.model.prompts[-1][: len(before)] == before


def history_of(server, **change: Any) -> list[Any]:
    """A Chat Completions history after one call, with fields of the client's message changed."""
    server.model.reply = REPLIES["other order"]
    history, _ = chat(server, [], False, True)
    history[1] = history[1] | change
    return history


def last_prompt(server) -> str:
    return server.engine.llm.tokenizer.decode(server.model.prompts[-1])


def test_what_a_client_has_changed_counts(server) -> None:
    """Edited calls and texts are the client's; lost reasoning is filled in; reasoning of its own stays."""
    history = history_of(server)
    call = history[1]["tool_calls"][0]
    edited = [{**call, "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 3}'}}]
    for change, expected in (
        ({"tool_calls": edited}, "<think>Hm.</think>Wait."),
        ({"content": "Go."}, "<think>Hm.</think>Go."),
        ({"reasoning_content": "Mine."}, "<think>Mine.</think>Wait."),
        ({"reasoning_content": ""}, "<think>Hm.</think>Wait."),
    ):
        chat(server, [history[0], history[1] | change, *history[2:]], False, True)
        assert expected in last_prompt(server), change
        assert ("Rome" in last_prompt(server)) is ("tool_calls" in change)


def test_an_unknown_call_is_rendered_as_it_was_sent(server) -> None:
    history = history_of(server)
    for message, name in ((history[1]["tool_calls"][0], "id"), (history[2], "tool_call_id")):
        message[name] = "call_00_ofSomeOtherService12"
    chat(server, history, False, True)
    assert "<think></think>Wait." in last_prompt(server)


def test_another_key_does_not_get_the_turn(model, serve) -> None:
    with serve(model, api_keys=["key-one", "key-two"]) as served:
        served.key = "key-one"
        history = history_of(served)
        for key, expected in (("key-two", "<think></think>Wait."), ("key-one", "<think>Hm.</think>Wait.")):
            served.key = key
            chat(served, history, False, True)
            assert expected in last_prompt(served), key


def test_another_cache_salt_does_not_get_the_turn(server) -> None:
    history = history_of(server)
    server.openai().chat.completions.create(model="tiny", messages=history, extra_body={"cache_salt": "x"})
    assert "Hm." not in last_prompt(server)


def test_a_server_without_the_memory_renders_what_clients_send(model, serve) -> None:
    with serve(model, turn_memory_bytes=0) as served:
        chat(served, history_of(served), False, True)
        assert "<think></think>Wait." in last_prompt(served)


WHOLE = "I look it up.</think>Wait, é" + call_markup(f"{CITY}\n{DAYS.format(3)}")
IN_REASONING = "I look it up." + call_markup(f"{CITY}\n{DAYS.format(3)}")
# Name -> (reply, the text before its cut, what the client is shown of that beside calls, the part that stays exact)
SAID, SHOWN = "I look it up.</think>Wait, é", ("I look it up.", "Wait, é")
CUTS = {
    "in reasoning": (WHOLE, "I look", ("I look", ""), "I look"),
    "after reasoning": (WHOLE, "I look it up.</think>", ("I look it up.", ""), "I look it up.</think>"),
    "in text": (WHOLE, "I look it up.</think>Wai", ("I look it up.", "Wai"), "I look it up.</think>Wai"),
    "in a tag": (WHOLE, WHOLE[: WHOLE.index("tool_calls") + 4], SHOWN, SAID),
    "in a name": (WHOLE, WHOLE[: WHOLE.index("weather") + 3], SHOWN, SAID),
    "in a value": (WHOLE, WHOLE[: WHOLE.index("Oslo") + 2], ("I look it up.", "Wait, é\n\nOs"), SAID),
    "after a call": (WHOLE, WHOLE.removesuffix(f"{DSML}tool_calls>"), SHOWN, WHOLE.removesuffix(f"{DSML}tool_calls>")),
    "in a call in reasoning": (
        IN_REASONING, IN_REASONING[: IN_REASONING.index("Oslo") + 2], ("I look it up.\n\nOs", ""), "I look it up."
    ),
}  # fmt: skip


@PROTOCOLS
@STREAMED
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_turn_that_was_cut_off_goes_on_where_it_was(server, protocol: Protocol, streamed: bool, cut: Any) -> None:
    """As far as the client was shown what was sampled. The rest of a call is its text, without markup."""
    reply, before, (reasoning, content), exact = cut
    encode = server.model.tokenizer.encode
    server.model.reply = reply
    history, counts = protocol(server, [], streamed, thinking=True, limit=len(encode(before)))
    assert counts[2] == len(encode(before)), "cut by the limit"
    begun = server.model.prompts[-1] + encode(exact)
    server.model.reply = "So.</think>Done."
    later, _ = protocol(server, history, streamed, thinking=True)
    assert server.model.prompts[-1][: len(begun)] == begun
    said = last_prompt(server)[len(server.engine.llm.tokenizer.decode(begun)) - len(exact) :]
    said = said.partition("<｜end▁of▁sentence｜>")[0]
    shown, _, calls = said.partition(f"\n\n<{DSML}tool_calls>")
    assert shown.rstrip() == f"{reasoning}</think>{content}".rstrip()
    assert calls == "" or (said == WHOLE and "tool_result" in last_prompt(server))
    wrote_all = wrote(server)
    server.model.reply = "Bye.</think>Bye."
    protocol(server, later, streamed, thinking=True)
    assert server.model.prompts[-1][: len(wrote_all)] == wrote_all


@STREAMED
@pytest.mark.parametrize("place", range(0, len(WHOLE) + 1, 9))
def test_wherever_a_turn_is_cut_off_no_markup_is_shown(server, place: int, streamed: bool) -> None:
    """Reasons of the end, in the three protocols."""
    server.model.reply = WHOLE
    limit = max(1, len(server.model.tokenizer.encode(WHOLE[:place])))
    done = place >= len(WHOLE)
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    question = [{"role": "user", "content": QUESTION}]
    create = server.openai().chat.completions.create
    options: dict[str, Any] = {"model": "tiny", "messages": question, "tools": [tool], "max_tokens": limit}
    if streamed:
        choices = [chunk.choices[0] for chunk in create(stream=True, **options)]
        reason, texts = choices[-1].finish_reason, [choice.delta.content or "" for choice in choices]
    else:
        choice = create(**options).choices[0]
        reason, texts = choice.finish_reason, [choice.message.content]
    assert reason == ("tool_calls" if done else "length") and DSML not in "".join(texts)
    client = server.anthropic().messages
    options = {"model": "tiny", "messages": question, "max_tokens": limit}
    options |= {"tools": [{"name": "weather", "input_schema": SCHEMA}]}
    if streamed:
        with client.stream(**options) as events:
            message = events.get_final_message()
    else:
        message = client.create(**options)
    assert message.stop_reason == ("tool_use" if done else "max_tokens") and DSML not in message.to_json()
    flat = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    options = {"model": "tiny", "input": QUESTION, "tools": [flat], "max_output_tokens": limit}
    answer = server.openai().responses.create
    response = list(answer(stream=True, **options))[-1].response if streamed else answer(**options)
    assert response.status == ("completed" if done else "incomplete") and DSML not in str(response.output)
    assert done or response.incomplete_details.reason == "max_output_tokens"


def test_a_forced_call_that_was_cut_off_is_its_text(server) -> None:
    """The prompt has opened the block, which the client does not see: nothing of it stays."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    block = call_markup(f"{CITY}\n{DAYS.format(3)}").partition("tool_calls>\n")[2]
    for end, expected in (
        ("Os", "</think>Os"),
        (f"</{DSML}invoke>", "</think>\n\n" + call_markup(f"{CITY}\n{DAYS.format(3)}").strip()),
    ):
        server.model.reply = block
        options: dict[str, Any] = {"model": "tiny", "tools": [tool], "extra_body": {"thinking": {"type": "disabled"}}}
        question = {"role": "user", "content": QUESTION}
        create = server.openai().chat.completions.create
        limit = len(server.model.tokenizer.encode(block[: block.index(end) + len(end)]))
        choice = create(messages=[question], tool_choice="required", max_tokens=limit, **options).choices[0]
        message, begun = choice.message.model_dump(exclude_none=True), list(server.model.prompts[-1])
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "sun"} for call in message.get("tool_calls", ())
        ]
        server.model.reply = "ok"
        create(messages=[question, message, *(results or [{"role": "user", "content": NOTE}])], **options)
        assert choice.finish_reason == "length" and f"{expected}<｜end▁of▁sentence｜>" in last_prompt(server)
        assert not results or server.model.prompts[-1][: len(begun)] == begun


def test_an_answer_that_a_stop_string_has_ended_is_rendered_as_sent(server) -> None:
    server.model.reply = "It is sunny"
    question = [{"role": "user", "content": QUESTION}]
    extra: dict[str, Any] = {"thinking": {"type": "disabled"}}
    create = server.openai().chat.completions.create
    said = create(model="tiny", messages=question, extra_body=extra, stop="is").choices[0].message.content
    history = [*question, {"role": "assistant", "content": said}, {"role": "user", "content": NOTE}]
    create(model="tiny", messages=history, extra_body=extra)
    assert f"</think>{said}<｜end▁of▁sentence｜><｜User｜>" in last_prompt(server)


def turn(size: int) -> SaidTurn:
    from array import array

    return SaidTurn(array("i", range(size)), True, "", "")


def test_the_memory_is_bounded_and_drops_what_was_not_used_for_longest() -> None:
    memory = SaidTurns(max_bytes=10 * turn(100).num_bytes)
    for number in range(10):
        memory.keep("me", bytes([number]), turn(100))
    assert memory.find("me", b"\0") is not None and memory.find("you", b"\1") is None
    memory.keep("me", b"new", turn(100))
    assert memory.find("me", b"\0") is not None and memory.find("me", b"\1") is None
    memory.keep("me", b"new", turn(200))
    assert memory.num_bytes <= memory.max_bytes
    memory.keep("me", b"huge", turn(100_000))
    assert memory.find("me", b"huge") is None and memory.find("me", b"new") is not None
