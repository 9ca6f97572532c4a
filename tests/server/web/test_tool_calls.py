"""The chat page: tools of the settings, calls as cards, results, and chats that hold them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from dsv4.tokenizer import Tokenizer

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
PIECES = [
    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"city": "Os'}},
    {"index": 0, "function": {"arguments": 'lo"}'}},
    {"index": 1, "id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
]
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
]


def set_tools(tab: Any, text: str) -> None:
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_label("Tools").fill(text)
    tab.page.get_by_role("button", name="Done").click()


def ask_and_call(tab: Any) -> Any:
    tab.ask("How is it in Oslo?", ["Let me look."], thinking=["Hm."], calls=PIECES, finish="tool_calls")
    tab.wait("done")
    return tab.page.locator(".tool-card")


def test_calls_are_cards_and_their_results_go_back(tab: Any) -> None:
    page = tab.page
    set_tools(tab, json.dumps([WEATHER]))
    cards = ask_and_call(tab)
    assert tab.mock.requests[0]["tools"] == [{"type": "function", "function": WEATHER}]
    expect(cards).to_have_count(2)
    assert cards.nth(0).locator(".code code").inner_text() == '{\n  "city": "Oslo"\n}'
    expect(cards.nth(0).locator("summary")).to_contain_text("waits for its result")
    page.get_by_label("Result of weather").fill('{"degrees":-3}')
    page.get_by_label("Result of clock").fill("noon")
    tab.will_answer(["It is cold."])
    page.get_by_role("button", name="Send results").click()
    expect(page.locator(".assistant")).to_have_count(2)
    assert tab.wait("done").locator(".answer").inner_text() == "It is cold."
    assert tab.mock.requests[1]["messages"] == [
        {"role": "user", "content": "How is it in Oslo?"},
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees":-3}'},
        {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    ]
    page.reload()  # stored, and folded now
    assert [card.get_attribute("open") for card in cards.all()] == [None, None]
    cards.nth(0).locator("summary").press("Enter")
    expect(cards.nth(0).locator(".code").nth(1)).to_contain_text('"degrees": -3')
    expect(page.get_by_role("button", name="Send results")).to_be_hidden()
    tab.will_answer(["It is very cold."])
    tab.answer().get_by_role("button", name="Answer again").click()  # with the same results
    tab.wait("done")
    assert tab.mock.requests[2]["messages"] == tab.mock.requests[1]["messages"]
    assert "2 / 2" in tab.answer().locator(".pager").inner_text()


def test_a_message_instead_of_results(tab: Any) -> None:
    ask_and_call(tab)
    tab.ask("Never mind.", ["Fine."])
    tab.wait("done", 1)
    roles = [message["role"] for message in tab.mock.requests[1]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "user"]
    assert tab.mock.requests[1]["messages"][2]["content"] == "No result was given."


def test_a_call_that_was_cut_off_is_not_sent(tab: Any) -> None:
    tab.ask("Oslo?", [], calls=PIECES[:2], finish="length")
    tab.wait("length")
    expect(tab.page.locator(".tool-card summary")).to_contain_text("incomplete")
    assert tab.page.locator(".tool-card .code code").text_content() == '{"city": "Os'
    tab.ask("Again.", ["Fine."])
    tab.wait("done", 1)
    assert [message["role"] for message in tab.mock.requests[1]["messages"]] == ["user", "user"]


def test_too_long_after_results_edits_the_question(tab: Any) -> None:
    ask_and_call(tab)
    error = "This model's maximum context length is 9 tokens."
    tab.will_answer([], status=400, error=error)
    tab.page.get_by_role("button", name="Send results").click()
    tab.wait("error", 1).get_by_role("button", name="Edit message").click()
    expect(tab.page.get_by_role("textbox", name="Edit message")).to_have_value("How is it in Oslo?")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "Not sent: "),
        ("[1]", "Not sent: Tool 1 has no name."),
        ('[{"name": "a"}, {}]', "Not sent: Tool 2 has no name."),
    ],
)
def test_wrong_tools_are_said_and_not_sent(tab: Any, text: str, error: str) -> None:
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_label("Tools").fill(text)
    expect(tab.page.locator("#tools-error")).to_contain_text(error)
    tab.page.get_by_role("button", name="Done").click()
    tab.ask("hi", ["ok"])
    tab.wait("done")
    assert "tools" not in tab.mock.requests[0]


def test_chats_with_calls_are_exported_and_imported(tab: Any, tmp_path: Path) -> None:
    page = tab.page
    ask_and_call(tab)
    page.get_by_label("Result of weather").fill("cold")
    tab.will_answer(["Brr."])
    page.get_by_role("button", name="Send results").click()
    tab.wait("done", 1)
    page.get_by_role("button", name="Share this chat").click()
    page.get_by_role("button", name="Copy as Markdown").click()
    tab.until(lambda: "Brr." in page.evaluate("navigator.clipboard.readText()"))
    markdown = page.evaluate("navigator.clipboard.readText()")
    assert 'Calls `weather`:\n\n```\n{\n  "city": "Oslo"\n}\n```\n\nResult:\n\n```\ncold\n```' in markdown
    page.get_by_role("button", name="Share this chat").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export JSON").click()
    file = tmp_path / "chat.json"
    file.write_text(Path(download.value.path()).read_text(encoding="utf-8"))
    page.evaluate("localStorage.clear()")
    page.reload()
    page.set_input_files("#import-file", file)
    expect(page.locator(".tool-card strong")).to_have_text(["weather", "clock"])
    tab.ask("And now?", ["Still."])
    tab.wait("done", 2)
    assert tab.mock.requests[-1]["messages"][1]["tool_calls"] == CALLS


CALL = (
    'I look.</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


def test_a_tool_round_with_the_real_server(open_tab: Callable[[str], Any], serve: Any, model: Any) -> None:
    model.reply = CALL
    with serve(model) as served:
        tab = open_tab(served.url + "/")
        set_tools(tab, json.dumps([WEATHER]))
        tab.ask("Oslo?")
        tab.wait("done")
        card = tab.page.locator(".tool-card")
        expect(card.locator("strong")).to_have_text("weather")
        expect(card.locator(".code").first).to_contain_text('"city": "Oslo"')
        model.reply = "</think>Brr."
        tab.page.get_by_label("Result of weather").fill("-3 degrees")
        tab.page.get_by_role("button", name="Send result").click()
        expect(tab.page.locator(".assistant")).to_have_count(2)
        tab.wait("done")
        assert tab.text() == "Brr."
        prompt = Tokenizer.from_pretrained(served.engine.llm.path).decode(model.prompts[-1])
        assert "-3 degrees" in prompt and "I look." in prompt, "the result and the reasoning before it"
