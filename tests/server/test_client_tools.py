"""Tools that Anthropic defines: those that the client runs are ordinary tools, those of its service are refused."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

DSML = "｜DSML｜"
QUESTION = [{"role": "user", "content": "What is in /tmp?"}]
WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
SCREEN = {"display_width_px": 800, "display_height_px": 600}
EDITOR = "str_replace_based_edit_tool"
# Type, name, further fields, input of a call, what the prompt says of it and what not.
TOOLS = [
    ("bash_20250124", "bash", {}, {"command": "ls /tmp"}, ["restart"], []),
    ("bash_20241022", "bash", {}, {"restart": True}, ["restart"], []),
    ("text_editor_20250728", EDITOR, {"max_characters": 999}, {"command": "view", "path": "/a", "view_range": [1, -1]},
     ["insert_text", "At most 999 characters"], ["undo_edit"]),
    ("text_editor_20250429", EDITOR, {}, {"command": "create", "path": "/a", "file_text": "x\n"}, [], ["undo_edit"]),
    ("text_editor_20250124", "str_replace_editor", {}, {"command": "undo_edit", "path": "/a"}, [], ["insert_text"]),
    ("computer_20250124", "computer", SCREEN, {"action": "left_click", "coordinate": [5, 7]},
     ["800 pixels wide", "scroll_amount"], ["zoom"]),
    ("computer_20241022", "computer", SCREEN, {"action": "type", "text": "hi"}, [], ["scroll", "zoom"]),
    ("computer_20251124", "computer", {**SCREEN, "enable_zoom": True}, {"action": "zoom", "region": [0, 0, 9, 9]},
     ["zoom"], []),
    ("memory_20250818", "memory", {}, {"command": "view", "path": "/memories"}, ["/memories", "new_path"], []),
]  # fmt: skip
EVERY_TOOL = pytest.mark.parametrize(
    ("kind", "name", "extra", "given", "said", "unsaid"), TOOLS, ids=[kind for kind, *_ in TOOLS]
)


def ask(server, streamed: bool = False, **options: Any) -> Any:
    options = {"model": "tiny", "max_tokens": 500, "messages": QUESTION} | options
    if not streamed:
        return server.anthropic().messages.create(**options)
    with server.anthropic().messages.stream(**options) as events:
        return events.get_final_message()


def block(name: str, given: dict[str, Any]) -> str:
    lines = [f"<{DSML}tool_calls>", f'<{DSML}invoke name="{name}">']
    for key, value in given.items():
        text = value if isinstance(value, str) else str(value).lower()
        string = str(isinstance(value, str)).lower()
        lines.append(f'<{DSML}parameter name="{key}" string="{string}">{text}</{DSML}parameter>')
    return "\n".join([*lines, f"</{DSML}invoke>", f"</{DSML}tool_calls>"])


def prompt(server) -> str:
    return server.engine.llm.tokenizer.decode(server.model.prompts[-1])


@EVERY_TOOL
@pytest.mark.parametrize("streamed", [True, False])
def test_a_call_comes_back_and_its_result_is_answered(
    server, streamed: bool, kind: str, name: str, extra: Any, given: Any, said: list[str], unsaid: list[str]
) -> None:
    tools = [{"type": kind, "name": name, **extra}, WEATHER]
    server.model.reply = "I look.</think>Wait.\n\n" + block(name, given)
    message = ask(server, streamed, tools=tools)
    assert [part.type for part in message.content] == ["thinking", "text", "tool_use"]
    call = message.content[-1]
    assert (call.name, call.input, message.stop_reason) == (name, given, "tool_use")
    assert all(text in prompt(server) for text in said) and not any(text in prompt(server) for text in unsaid)
    counted = server.anthropic().messages.count_tokens(model="tiny", messages=QUESTION, tools=tools)
    assert counted.input_tokens == message.usage.input_tokens
    wrote = server.model.prompts[-1] + server.model.tokenizer.encode(server.model.reply)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    history = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    server.model.reply = "so</think>Done."
    assert ask(server, streamed, tools=tools, messages=history).content[-1].text == "Done."
    assert server.model.prompts[-1][: len(wrote)] == wrote


@EVERY_TOOL
@pytest.mark.parametrize("strict", [False, True])
def test_a_call_can_be_forced(
    server, strict: bool, kind: str, name: str, extra: Any, given: Any, said: list[str], unsaid: list[str]
) -> None:
    tools = [{"type": kind, "name": name, "strict": strict, **extra}]
    for choice in ({"type": "any"}, {"type": "tool", "name": name}):
        for thinking in (True, False):
            begun = not thinking and choice["type"] == "tool"  # the prompt ends inside the block
            written = block(name, given).partition("tool_calls>\n")[2] if begun else "\n\n" + block(name, given)
            server.model.reply = f"I look.</think>{written}" if thinking else written
            mode = {"type": "adaptive" if thinking else "disabled"}
            message = ask(server, tools=tools, tool_choice=choice, thinking=mode)
            call = message.content[-1]
            assert (call.type, call.name, call.input, message.stop_reason) == ("tool_use", name, given, "tool_use")


def test_a_forced_strict_call_has_an_input_of_the_schema(server) -> None:
    server.model.reply = "I look.</think>\n\n" + block("bash", {"restart": True}).replace("true</", "tope</")
    tools = [{"type": "bash_20250124", "name": "bash", "strict": True}]
    message = ask(server, tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    (call,) = [part for part in message.content if part.type == "tool_use"]
    assert call.input == {"restart": True}, "letters that the schema forbids are replaced"


def refused(server, **options: Any) -> tuple[str | None, str]:
    with pytest.raises(anthropic.BadRequestError) as error:
        ask(server, **options)
    fault: Any = error.value.body
    return fault["error"]["param"], fault["error"]["message"]


def test_a_name_that_is_not_the_tools_own_is_refused_with_its_place(server) -> None:
    for kind, name, *_ in TOOLS:
        place, words = refused(server, tools=[WEATHER, {"type": kind, "name": "shell", **SCREEN}])
        assert place == "tools[1].name" and name in words
    assert refused(server, tools=[{"type": "text_editor_20250728", "name": "str_replace_editor"}])[0] == "tools[0].name"


@pytest.mark.parametrize(
    "kind",
    ["code_execution_20250825", "web_fetch_20250910", "tool_search_tool_regex_20251119", "mcp_toolset", "bash_new"],
)
def test_a_tool_of_anthropics_service_is_refused_with_its_place(server, kind: str) -> None:
    place, words = refused(server, tools=[WEATHER, {"type": kind, "name": "x"}])
    assert place is not None and place.startswith("tools[1]") and "not supported" in words


def test_web_search_is_not_offered_and_cannot_be_forced(server) -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    assert ask(server, tools=[search, WEATHER]).stop_reason == "end_turn" and "web_search" not in prompt(server)
    named = {"type": "tool", "name": "web_search"}
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}):
        for tools, choice in (([search], {"type": "any"}), ([search], named), ([search, WEATHER], named)):
            place, words = refused(server, tools=tools, tool_choice=choice, thinking=thinking, max_tokens=2000)
            assert place == "tool_choice" and "offered no tool" in words
