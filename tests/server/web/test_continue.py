"""Continuing an answer, editing a question that was too long, settings of one chat, the context meter."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from .test_tool_calls import PIECES


def test_an_answer_cut_at_the_limit_is_continued(tab: Any) -> None:
    tab.ask("count", ["one two"], thinking=["Hm."], finish="length")
    answer = tab.wait("length")
    assert "token limit" in answer.locator(".notice").inner_text()
    tab.will_answer([" three"])
    answer.get_by_role("button", name="Continue").click()
    assert tab.wait("done").locator(".answer").inner_text() == "one two three"
    last = tab.mock.requests[-1]["messages"][-1]
    assert last == {"role": "assistant", "content": "one two", "reasoning_content": "Hm.", "prefix": True}
    assert answer.locator(".stats").inner_text() == "3 tokens"
    assert tab.page.locator(".assistant").count() == 1


def test_figures_of_a_continued_answer_count_every_token_once(tab: Any) -> None:
    tab.ask("count", ["one ", "two "], finish="length")
    answer = tab.wait("length")
    tab.will_answer(["three ", "four"], held=threading.Event())
    answer.get_by_role("button", name="Continue").click()
    expect(answer.locator(".answer")).to_have_text("one two three")
    expect(answer.locator(".stats")).to_have_text("3 tokens")
    tab.page.keyboard.press("Escape")
    tab.wait("stopped")  # before its usage arrives
    expect(answer.locator(".stats")).to_have_text("3 tokens")
    tab.will_answer(["four"])
    answer.get_by_role("button", name="Continue").click()
    tab.wait("done")
    answer.locator(".stats").click()
    expect(answer.locator(".answer-details dd")).to_have_text(["dsv4-nano", "5 tokens", "4 tokens"])

    abandon = """async (node) =>
        (await import("/web/js/conversations.js")).stopAbandoned({ nodes: { a: node } })[0]"""
    timings = {"prompt_n": 9, "predicted_n": 11, "predicted_ms": 1000, "predicted_per_second": 10.0}
    before = {"tokens": 11, "timings": timings, "officialCost": {"model": "a", "usd": 0.25}}
    later = {"prompt_n": 20, "predicted_n": 21, "predicted_ms": 500, "predicted_per_second": 40.0}
    node = {"status": "streaming", "before": before, "timings": later, "officialCost": {"model": "a", "usd": 0.5}}
    node["usage"] = {"prompt_tokens": 20, "completion_tokens": 21}
    added = tab.page.evaluate(abandon, node)
    assert added["timings"] == {"prompt_n": 9, "predicted_n": 32, "predicted_ms": 1500, "predicted_per_second": 20}
    assert (added["tokens"], added["officialCost"]["usd"]) == (32, 0.75)
    assert (added["usage"]["prompt_tokens"], added["usage"]["completion_tokens"]) == (9, 32)


def test_figures_from_before_an_answer_went_on_stay_when_the_page_is_closed(tab: Any) -> None:
    tab.ask("count", ["one ", "two "], finish="length")
    answer = tab.wait("length")
    tab.will_answer(["three ", "four"], held=threading.Event())
    answer.get_by_role("button", name="Continue").click()
    expect(answer.locator(".answer")).to_have_text("one two three")
    # A closed page has no time for more than this event.
    leave = """() => {
        dispatchEvent(new Event("pagehide"));
        const stored = Object.entries(localStorage).find(([name]) => name.startsWith("dsv4.chat."))[1];
        return Object.values(JSON.parse(stored).nodes).find((node) => node.role === "assistant");
    }"""
    stored = tab.page.evaluate(leave)
    assert (stored["status"], stored["tokens"], stored["usage"]["completion_tokens"]) == ("stopped", 3, 3)
    tab.page.reload()
    tab.wait("stopped")
    expect(answer.locator(".stats")).to_have_text("3 tokens")


def test_a_call_that_was_cut_off_begins_anew(tab: Any) -> None:
    tab.ask("Oslo?", ["I look."], calls=PIECES[:2], finish="length")
    tab.wait("length")
    tab.will_answer([], calls=[PIECES[3] | {"index": 0}], finish="tool_calls")
    tab.answer().get_by_role("button", name="Continue").click()
    tab.wait("done")
    expect(tab.page.locator(".tool-card strong")).to_have_text(["clock"])
    expect(tab.page.locator(".tool-card .code code")).to_have_text(["{}"])


@pytest.mark.parametrize("thought", ["", "it sat"])
def test_the_real_server_continues(open_tab: Callable[[str], Any], serve: Any, model: Any, thought: str) -> None:
    with serve(model) as served:
        tab = open_tab(served.url + "/")
        tab.page.get_by_role("button", name="Settings").click()
        tab.page.get_by_label("Max tokens").fill("12")
        tab.page.get_by_role("button", name="Done").click()
        model.reply = f"{thought}</think>" + "the cat sat on the mat and on the cat " * 3
        tab.ask("hi")
        answer = tab.wait("length")
        begun = tab.text()
        model.reply = " and slept"
        answer.get_by_role("button", name="Continue").click()
        tab.wait("done")
        assert tab.text() == f"{begun} and slept"
        assert answer.locator(".thinking-body").text_content().strip() == thought
        meter = tab.page.get_by_role("meter", name="Context used")
        expect(meter).to_have_attribute("aria-valuemax", str(served.engine.llm.max_model_len))
        assert int(meter.get_attribute("aria-valuenow") or 0) > 12


def test_too_long_offers_to_edit_the_message(tab: Any) -> None:
    tab.ask("long long", status=400, answer=[], error="This model's maximum context length is 9 tokens.")
    tab.wait("error").get_by_role("button", name="Edit message").click()
    area = tab.page.get_by_role("textbox", name="Edit message")
    expect(area).to_have_value("long long")
    tab.will_answer(["fine"])
    area.fill("short")
    area.press("Enter")
    assert tab.wait("done").locator(".answer").inner_text() == "fine"


@pytest.mark.parametrize("tab", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_the_composer_fits_a_phone_with_the_meter(tab: Any) -> None:
    models = {"data": [{"id": "dsv4-nano", "context_window": 8}]}
    tab.page.route("**/v1/models", lambda route: route.fulfill(json=models))
    tab.page.reload()
    tab.ask("hi", ["ok", "ok"])
    tab.wait("done")
    meter = tab.page.get_by_role("meter", name="Context used")
    expect(meter).to_have_attribute("aria-valuetext", "Context: 7 of 8 tokens (88 %)")
    box = tab.page.locator(".composer-box").bounding_box()
    send = tab.page.get_by_role("button", name="Send message").bounding_box()
    assert send["width"] == 36 and send["x"] + send["width"] <= box["x"] + box["width"] - 4


def test_settings_of_one_chat(tab: Any) -> None:
    page = tab.page

    def settings(system: str, own: bool | None = None) -> None:
        page.get_by_role("button", name="Settings").click()
        if own is not None:
            page.get_by_label("Only for this chat").set_checked(own)
        page.get_by_label("System prompt").fill(system)
        page.get_by_role("button", name="Done").click()

    settings("For all.")
    settings("A pirate.", own=True)
    tab.ask("one", ["ok"])
    tab.wait("done")
    page.reload()
    tab.ask("two", ["ok"])
    tab.wait("done", 1)
    page.locator("#new-chat").click()
    tab.ask("three", ["ok"])
    tab.wait("done")
    systems = [request["messages"][0]["content"] for request in tab.mock.requests]
    assert systems == ["A pirate.", "A pirate.", "For all."]
    page.get_by_role("button", name="one", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("A pirate.")
    page.get_by_label("Only for this chat").uncheck()
    expect(page.get_by_label("System prompt")).to_have_value("For all.")
