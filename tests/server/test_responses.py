"""The Responses API through OpenAI's SDK, streamed and whole."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.server.responses_api import CALL, QUESTION, STREAMED, WEATHER, ask, events, markup, output, prompt, refused


def test_reasoning_and_answer_are_items_and_counted(server) -> None:
    server.model.reply = "easy\nParis.</think>Paris é 🙂"
    answer = ask(server, instructions="Be brief.", metadata={"a": "b"}, user="me")
    assert answer.id.startswith("resp_") and answer.object == "response" and answer.status == "completed"
    reasoning, message = answer.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "easy\nParis.", [])
    assert (message.role, message.status, message.phase) == ("assistant", "completed", "final_answer")
    assert answer.output_text == "Paris é 🙂"
    assert (answer.instructions, answer.metadata, answer.user, answer.model) == ("Be brief.", {"a": "b"}, "me", "tiny")
    sampled = len(server.model.tokenizer.encode(server.model.reply)) + 1  # end of sentence counts
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(server.model.prompts[0]), sampled)
    assert usage.output_tokens_details.reasoning_tokens == len(server.model.tokenizer.encode("easy\nParis."))
    assert usage.total_tokens == usage.input_tokens + sampled and usage.input_tokens_details.cached_tokens == 0


def test_events_have_their_order_numbers_and_names(server) -> None:
    server.model.reply = "ab</think>cd"
    found = events(server)
    item, part = "response.output_item", "response.content_part"
    assert [event.type for event in found] == [
        *("response.created", "response.in_progress", f"{item}.added", f"{part}.added"),
        *(["response.reasoning_text.delta"] * 2 + ["response.reasoning_text.done"]),
        *(f"{part}.done", f"{item}.done", f"{item}.added", f"{part}.added"),
        *(["response.output_text.delta"] * 2 + ["response.output_text.done"]),
        *(f"{part}.done", f"{item}.done", "response.completed"),
    ]
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert len({found[0].response.id, found[-1].response.id}) == 1
    assert found[0].response.status == "in_progress" and found[0].response.output == []
    text = server.http().post("/v1/responses", json={"model": "tiny", "input": "x", "stream": True}).text
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    assert all(json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ") for name, data in frames)
    assert "[DONE]" not in text


def test_the_sdks_stream_helper_accumulates_a_response(server) -> None:
    server.model.reply = "ab</think>cd" + CALL.partition("</think>")[2]
    with server.openai().responses.stream(model="tiny", input="x", tools=[WEATHER]) as stream:
        final = list(stream)[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output[1].phase == "commentary" and final.output_text == "cd"
    assert json.loads(final.output[2].arguments) == {"city": "Oslo"}


def test_every_base_url_has_it(server) -> None:
    for base in ("", "/v1", "/beta", "/beta/v1"):
        answer = server.openai(base).responses.create(model="deepseek-flash", input="x")
        assert (answer.output_text, answer.model) == ("ok", "deepseek-flash")
        counted = server.openai(base).responses.input_tokens.count(model="tiny", input="x")
        assert counted.input_tokens == len(server.model.prompts[0])


def test_effort_and_the_roles_reach_the_prompt(server) -> None:
    for effort in ("low", "high", "max", "none"):
        ask(server, reasoning={"effort": effort, "summary": "auto"})
    low, high, most, off = map(server.engine.llm.tokenizer.decode, server.model.prompts)
    assert "Reasoning Effort" not in low and low.endswith("<think>")
    assert "Absolute maximum" in high and "Beyond maximum" in most and off.endswith("</think>")
    answer = ask(server, reasoning={"effort": "low", "summary": "auto"})
    assert (answer.reasoning.effort, answer.reasoning.summary) == ("low", "auto")
    texts = [{"type": "input_text", "text": "Be kind."}, {"type": "input_text", "text": "Be fast."}]
    ask(server, input=[{"role": "developer", "content": texts}, QUESTION], instructions="Top.")
    assert "Top.<｜User｜>Be kind.\n\nBe fast.\n\nWeather in Oslo?<｜Assistant｜>" in prompt(server)


@STREAMED
def test_max_output_tokens_leaves_an_incomplete_response(server, streamed: bool) -> None:
    server.model.reply = "abcdef</think>ghijkl"
    answer = output(server, streamed, max_output_tokens=9)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output_text, answer.output[-1].status, answer.usage.output_tokens) == ("gh", "incomplete", 9)


def test_log_probabilities_that_include_names_are_there(server) -> None:
    server.model.reply = "</think>ab"
    answer = output(server, False, include=["message.output_text.logprobs"])
    (part,) = answer.output[-1].content
    assert "".join(token.token for token in part.logprobs) == "ab" and part.logprobs[0].top_logprobs == []


@STREAMED
def test_a_tools_loop_is_exact(server, streamed: bool) -> None:
    """Without stored responses: the next prompt begins with the last one and all that the model wrote."""
    server.model.reply = CALL
    options = {"tools": [WEATHER], "store": False, "include": ["reasoning.encrypted_content"]}
    answer = output(server, streamed, input=[QUESTION], **options)
    reasoning, call = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Oslo"})
    assert call.call_id.startswith("call_") and call.id.startswith("fc_") and answer.store is False
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    # As Codex does: the text of the reasoning is not sent back.
    kept = {"type": "reasoning", "id": reasoning.id, "summary": [], "encrypted_content": reasoning.encrypted_content}
    wrote = server.model.prompts[-1] + server.model.tokenizer.encode(CALL)
    server.model.reply = "sunny</think>Sunny."
    history = [QUESTION, kept, call.model_dump(exclude_none=True), result]
    assert output(server, streamed, input=history, **options).output_text == "Sunny."
    assert server.model.prompts[-1][: len(wrote)] == wrote
    parts = [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "and wind"}]
    ask(server, input=[*history[:-1], result | {"output": parts}], **options)
    assert "<tool_result>sun\n\nand wind</tool_result>" in prompt(server)


def test_sealed_reasoning_is_checked(server) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": []}
    for sealed in ("dsv4.1.0123456789abcdef.YWJj", "dsv4.1.x", "dsv4.1.é"):
        place, words = refused(server, input=[QUESTION, item | {"encrypted_content": sealed}, QUESTION])
        assert place == "input[1].encrypted_content" and "it was changed or cut off" in words
    ask(server, input=[QUESTION, item | {"encrypted_content": "gAAAA-of-another-service"}, QUESTION])
    assert ask(server).output[0].type == "message", "no reasoning, no item"
    server.model.reply = "ab</think>cd"
    assert ask(server).output[0].encrypted_content is None


def test_namespaces_and_calls_of_their_tools(server) -> None:
    tools = [{"type": "namespace", "name": "mcp__files", "description": "d", "tools": [WEATHER]}, WEATHER]
    server.model.reply = "</think>" + markup("mcp__files__weather", city="Oslo")
    answer = ask(server, input=[QUESTION], tools=tools)
    call = answer.output[0]
    assert (call.namespace, call.name) == ("mcp__files", "weather")
    history = [QUESTION, call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}]
    ask(server, input=history, tools=tools)
    assert 'invoke name="mcp__files__weather"' in prompt(server).partition("<｜User｜>")[2]


@STREAMED
@pytest.mark.parametrize("name", ["apply_patch", "shell"])
def test_custom_tools_have_plain_text_for_input(server, streamed: bool, name: str) -> None:
    definition = r'start: "*** Begin " /"[a-z]"/ "\n" line+' + '\nline: "+" /[a-z]+/ "\\n"'
    form = {"type": "grammar", "syntax": "lark", "definition": definition}
    tools = [{"type": "custom", "name": name, "description": "Runs it.", "format": form}]
    text = '*** Begin "x"\n+line\n'
    server.model.reply = "</think>\n\n" + markup(name, input=text)
    found = events(server, input=[QUESTION], tools=tools)
    pieces = [event for event in found if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(event.delta for event in pieces) == text
    assert [event.sequence_number for event in found] == list(range(len(found)))
    answer = found[-1].response if streamed else ask(server, input=[QUESTION], tools=tools)
    call = answer.output[0]
    assert (call.type, call.name, call.input) == ("custom_tool_call", name, text)
    assert call.id.startswith("ctc_") and {event.item_id for event in pieces} == {found[-1].response.output[0].id}
    assert answer.tools[0].type == "custom" and answer.tools[0].name == name
    assert name == "apply_patch" or json.dumps(definition)[1:-1] in prompt(server)
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    wrote = server.model.prompts[-1] + server.model.tokenizer.encode(server.model.reply)
    server.model.reply = "</think>Done."
    assert ask(server, input=[QUESTION, call.model_dump(), result], tools=tools).output_text == "Done."
    assert server.model.prompts[-1][: len(wrote)] == wrote


def test_outputs_follow_their_calls_whatever_stands_between(server) -> None:
    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": "weather", "arguments": "{}"}

    def result(name: str) -> dict[str, Any]:
        return {"type": "function_call_output", "call_id": name, "output": f"of {name}"}

    note = {"role": "developer", "content": "Note."}
    a, b = "<tool_result>of a</tool_result>", "<tool_result>of b</tool_result>"
    for history, expected in (
        ([call("a"), note, result("a")], [a, "Note."]),
        ([call("a"), call("b"), result("b"), note, result("a")], [a, b, "Note."]),
        ([call("a"), note, call("b"), result("a"), result("b")], [a, "Note.", b]),
        ([call("a"), result("a"), call("b"), result("b")], [a, "<｜Assistant｜>", b]),
    ):
        ask(server, input=[QUESTION, *history], tools=[WEATHER])
        places = [prompt(server).rindex(text) for text in expected]
        assert places[0] < places[-1] and (expected[1] == "<｜Assistant｜>" or places == sorted(places))
    assert refused(server, input=[QUESTION, call("a")])[1] == "No tool output found for tool call a. (input[1])"
    assert "No tool call found" in refused(server, input=[QUESTION, result("a")])[1]


class Color(BaseModel, extra="forbid"):
    color: Literal["red", "blue"]


@STREAMED
@pytest.mark.parametrize("thinking", [True, False])
def test_forms_are_enforced_on_a_model_that_writes_something_else(server, streamed: bool, thinking: bool) -> None:
    server.model.reply = "I think.</think>No." if thinking else "No."
    options = {"reasoning": {"effort": "low" if thinking else "none"}, "max_output_tokens": 600}
    client = server.openai()
    assert client.responses.parse(model="tiny", input="x", text_format=Color, **options).output_parsed is not None
    form = {"type": "json_object"}
    loose = output(server, streamed, input="Give me json", text={"format": form}, **options)
    assert loose.output_text.startswith("{") and loose.text.format.type == "json_object"
    schema = {"type": "json_schema", "name": "c", "schema": Color.model_json_schema(), "strict": True}
    assert Color.model_validate_json(output(server, streamed, text={"format": schema}, **options).output_text)
    paint = {"type": "function", "name": "paint", "parameters": Color.model_json_schema(), "strict": True}
    space = {"type": "namespace", "name": "box", "description": "d", "tools": [paint]}
    one = {"type": "function", "name": "paint"}
    for tools, choice, name in (
        ([paint], "required", "paint"),
        ([WEATHER, paint], one, "paint"),
        ([space], "required", "paint"),
        ([WEATHER, paint], {"type": "allowed_tools", "mode": "required", "tools": [one]}, "paint"),
    ):  # fmt: skip
        answer = output(server, streamed, tools=tools, tool_choice=choice, parallel_tool_calls=False, **options)
        (call,) = [item for item in answer.output if item.type.endswith("_call")]
        assert call.name == name and answer.parallel_tool_calls is False
        assert Color.model_validate_json(call.arguments)
        assert answer.tool_choice == choice or answer.tool_choice.model_dump(exclude_none=True) == choice


def test_a_custom_tool_can_be_forced_beside_strict_functions(server) -> None:
    paint = {"type": "function", "name": "paint", "parameters": Color.model_json_schema(), "strict": True}
    tools, choice = [{"type": "custom", "name": "shell"}, paint], {"type": "custom", "name": "shell"}
    for before, options in (("I think.</think>\n\n", {}), ("", {"reasoning": {"effort": "none"}})):
        block = markup("shell", input="ls -l")
        server.model.reply = before + (block if before else block.partition("tool_calls>\n")[2])
        answer = ask(server, input=[QUESTION], tools=tools, tool_choice=choice, **options)
        assert answer.output[-1].input == "ls -l" and answer.tool_choice.model_dump() == choice
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [choice]}
    ask(server, input=[QUESTION], tools=tools, tool_choice=allowed)
    assert '"shell"' in prompt(server) and '"paint"' not in prompt(server)


def test_what_is_not_supported_is_refused_with_its_place(server) -> None:
    for name, value in (
        *(
            ("background", True),
            ("conversation", "conv_1"),
            ("prompt", {"id": "p"}),
            ("response_format", {"type": "json_object"}),
        ),
        *(("store", "yes"), ("parallel_tool_calls", 1), ("previous_response_id", 5), ("truncation", "middle")),
        *(("include", "all"), ("metadata", {"a": 1}), ("metadata", {str(i): "" for i in range(17)})),
        *(("max_output_tokens", 0), ("max_output_tokens", "9"), ("temperature", 3), ("top_k", -2)),
    ):
        place, words = refused(server, extra_body={name: value})
        assert place == name, words
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    for place, tools, choice in (
        ("tool_choice.tools[0]", [], allowed),
        ("tool_choice.tools[0]", [WEATHER], allowed | {"tools": [5]}),
        ("tool_choice.tools", [WEATHER], allowed | {"tools": "all"}),
        ("tool_choice.mode", [WEATHER], allowed | {"mode": "any"}),
        ("tool_choice", [], "required"),
        ("tool_choice", [{"type": "web_search"}], "required"),
        ("tool_choice", [{"type": "web_search"}], {"type": "web_search"}),
    ):
        assert refused(server, tools=tools, tool_choice=choice)[0] == place
    image = {"type": "input_image", "image_url": "https://a/b.png"}
    assert refused(server, input=[QUESTION, {"role": "user", "content": [image]}])[0] == "input[1].content[0]"
    seen = {"type": "function_call_output", "call_id": "a", "output": [image]}
    assert refused(server, input=[QUESTION, seen])[0] == "input[1].output[0]"
    assert refused(server, input=[QUESTION, {"role": "user", "content": [{"type": "nothing"}]}])[0].startswith(
        "input[1]"
    )
    assert refused(server, input=[])[1] == "Input items array must not be empty"
    assert refused(server, model="nobody")[0] == "model"
    assert refused(server, text={"format": {"type": "json_schema", "name": "x", "schema": {"uniqueItems": True}}})[0]
    for kind in ("mcp", "file_search", "code_interpreter", "computer_use_preview", "local_shell", "shell"):
        place, words = refused(server, tools=[{"type": "web_search"}, {"type": kind, "server_label": "a"}])
        assert place == "tools[1]" and words.startswith(f"tools[1] is unavailable: {kind}: this server "), words
    for fields in ({"max_tool_calls": 0}, {"max_tool_calls": "x"}, {"n": 2}):
        assert refused(server, extra_body=fields)[0] == next(iter(fields))
    # What agents declare unasked is not offered to the model, as in the hosted service.
    kinds = ("web_search", "image_generation", "tool_search", "of_tomorrow")
    answer = ask(server, tools=[{"type": kind} for kind in kinds], extra_body={"max_tool_calls": 3})
    assert "Tools" not in prompt(server) and answer.max_tool_calls == 3


def test_an_error_within_a_stream_is_a_failed_response(server) -> None:
    server.model.reply = "ab</think>cd"
    with pytest.MonkeyPatch.context() as patch:
        # Only this answer fails: the engine itself would be down for good.
        asked = server.engine.stream

        async def broken(*args: Any) -> Any:
            count = 0
            async for event in asked(*args):
                if count == 4:
                    raise RuntimeError("out of order")
                count += 1
                yield event

        patch.setattr(server.engine, "stream", broken)
        found = events(server)
    failed = found[-1]
    assert failed.type == "response.failed" and failed.sequence_number == len(found) - 1
    assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
    assert failed.response.error.message == "out of order" and failed.response.id == found[0].response.id
    assert failed.response.output[0].content[0].text == "ab"


def test_a_client_that_leaves_ends_the_generation(server) -> None:
    server.model.reply = "a" * 5000
    server.model.seconds_per_step = 0.002
    with server.http().stream("POST", "/v1/responses", json={"model": "tiny", "input": "x", "stream": True}) as stream:
        lines = stream.iter_lines()  # held: its end would close the connection
        next(lines)
        server.wait_until_running()
    server.wait_until_idle()
    assert server.model.num_sampled < 4000


def test_cached_tokens_are_reported(server, monkeypatch) -> None:
    asked = server.engine.stream

    async def with_hit(*args: Any) -> Any:
        async for event in asked(*args):
            yield replace(event, cached_tokens=7)

    monkeypatch.setattr(server.engine, "stream", with_hit)
    assert ask(server).usage.input_tokens_details.cached_tokens == 7


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(model, serve) -> None:
    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": text}

    with serve(model, max_model_len=600) as served:
        turns = [[said("user", f"<{i}>" + "x" * 90), said("assistant", f"answer {i}")] for i in range(9)]
        history = [said("developer", "Rule."), *(item for turn in turns for item in turn), said("user", "Last.")]
        options = {"input": history, "instructions": "Top.", "reasoning": {"effort": "low"}}
        with pytest.raises(openai.BadRequestError, match="maximum context length is 600 tokens"):
            ask(served, **options)
        answer = ask(served, truncation="auto", **options)
        kept = [i for i in range(9) if f"<{i}>" in prompt(served)]
        assert answer.truncation == "auto" and kept and kept == list(range(9 - len(kept), 9))
        assert 600 - 150 < len(model.prompts[-1]) < 600, "no more is dropped than has to be"
        assert "Top.<｜User｜>Rule." in prompt(served) and "Last." in prompt(served)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            ask(served, truncation="auto", input=[*history, said("user", "y" * 700)])
        short = ask(served, truncation="auto", input="x")
        assert short.output_text == "ok"


def test_a_turn_that_is_too_long_loses_its_oldest_rounds(model, serve) -> None:
    """An agent's turn is one question and many calls: the question and the latest rounds stay."""
    rounds: list[Any] = []
    for i in range(9):
        rounds += [
            {"type": "function_call", "call_id": f"c{i}", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{i}", "output": f"<{i}>" + "x" * 90},
        ]
    with serve(model, max_model_len=1800) as served:
        history = [{"role": "user", "content": "Old."}, {"role": "assistant", "content": "Yes."}, QUESTION]
        note = {"role": "developer", "content": "Rule."}
        options = {"tools": [WEATHER], "reasoning": {"effort": "low"}}
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1800 tokens"):
            ask(served, input=[*history, *rounds], **options)
        ask(served, truncation="auto", input=[*history, *rounds[:4], note, *rounds[4:]], **options)
        kept = [i for i in range(9) if f"<{i}>" in prompt(served)]
        assert kept and kept == list(range(9 - len(kept), 9)) and "Weather in Oslo?" in prompt(served)
        assert "Old." not in prompt(served) and "Rule." in prompt(served)
        assert 1800 - 420 < len(model.prompts[-1]) < 1800, "no more is dropped than has to be"
