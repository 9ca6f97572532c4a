"""The chat page: asking, thinking, stopping, versions, several chats, and request fields of the switches."""

import re
import threading
from typing import Any

import pytest
from playwright.sync_api import expect

MODEL = "dsv4-nano"


def test_answer_streams_as_markdown_with_figures(tab: Any) -> None:
    pieces = ["Sum: **4", "2**", "\n\n```python\nprint(1)", "\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |"]
    seen = threading.Event()
    tab.ask("What is 40 + 2?", pieces, held=seen)
    # Unclosed emphasis is drawn closed for now.
    expect(tab.answer().locator(".answer strong")).to_have_text("4")
    assert tab.answer().get_attribute("data-status") == "streaming"
    seen.set()
    answer = tab.wait("done")
    assert answer.locator(".answer strong").inner_text() == "42"
    assert answer.locator("figure.code pre").inner_text() == "print(1)"
    expect(answer.locator("figure.code .hljs-built_in")).to_have_text("print")
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator(".stats").inner_text() == "4 tokens"  # too few tokens for a rate
    assert tab.page.locator(".bubble").inner_text() == "What is 40 + 2?"
    assert tab.page.locator("#model").inner_text() == MODEL
    answer.get_by_role("button", name="Copy code").click()
    copied = "navigator.clipboard.readText()"
    tab.until(lambda: tab.page.evaluate(copied) == "print(1)")
    answer.get_by_role("button", name="Copy answer").click()
    tab.until(lambda: tab.page.evaluate(copied) == "".join(pieces))


def test_thinking_panel_opens_counts_and_collapses(tab: Any) -> None:
    seen = threading.Event()
    tab.ask("hi", ["Done."], thinking=["First ", "second.", seen], milliseconds=1500)
    panel = tab.page.locator("details.thinking")
    expect(panel).to_have_attribute("open", "")
    expect(panel.locator("summary")).to_have_text(re.compile(r"^Thinking( \d+\.\d s)?$"))
    expect(panel.locator("summary")).to_have_text(re.compile(r"Thinking \d+\.\d s"))
    expect(panel.locator(".thinking-body")).to_have_text("First second.")
    seen.set()
    tab.wait("done")
    assert panel.get_attribute("open") is None
    # The duration is by the engine's clock, from the first thought to the answer, independent of arrival times.
    assert panel.locator("summary").inner_text() == "Thought for 3.0 s"
    panel.locator("summary").click()
    assert panel.locator(".thinking-body").is_visible()
    assert "First" not in tab.text()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_the_received_text_and_closes_the_connection(tab: Any, how: str) -> None:
    tab.ask("count", [f"{i} " for i in range(500)], pause=0.05)
    expect(tab.answer().locator(".answer")).to_contain_text("0 1 2")
    if how == "button":
        tab.page.get_by_role("button", name="Stop").click()
    else:
        tab.page.keyboard.press("Escape")
    answer = tab.wait("stopped")
    kept = tab.text()
    assert kept.startswith("0 1 2") and "499" not in kept
    assert "stopped" in answer.locator(".notice").inner_text()
    tab.until(lambda: tab.mock.disconnects == 1)
    assert tab.text() == kept
    expect(tab.page.locator("#announce")).to_have_text("This answer was stopped.")
    # The stopped answer is part of the next request.
    tab.ask("go on", ["ok"])
    tab.wait("done")
    assert [message["role"] for message in tab.mock.requests[-1]["messages"]] == ["user", "assistant", "user"]
    assert tab.mock.requests[-1]["messages"][1]["content"].strip() == kept.strip()


def test_answer_again_and_edit_keep_versions(tab: Any) -> None:
    tab.ask("one", ["first"])
    answer = tab.wait("done")
    tab.will_answer(["second"])
    answer.get_by_role("button", name="Answer again").click()
    expect(tab.answer().locator(".pager")).to_contain_text("2 / 2")
    tab.wait("done")
    assert [request["messages"] for request in tab.mock.requests] == [[{"role": "user", "content": "one"}]] * 2
    tab.answer().get_by_role("button", name="Previous version").click()
    assert tab.text() == "first" and "1 / 2" in tab.answer().inner_text()
    tab.page.locator(".user").hover()
    tab.page.get_by_role("button", name="Edit message").click()
    tab.page.get_by_role("textbox", name="Edit message").fill("two")
    tab.page.keyboard.press("Enter")
    tab.wait("done")
    assert tab.page.locator(".bubble").inner_text() == "two"
    assert tab.mock.requests[-1]["messages"] == [{"role": "user", "content": "two"}]
    tab.page.locator(".user").get_by_role("button", name="Previous version").click()
    assert tab.text() == "first"


def test_an_edit_while_an_answer_is_written_is_kept(tab: Any) -> None:
    held = threading.Event()
    tab.ask("one", ["a ", "b"], held=held)
    expect(tab.answer().locator(".answer")).to_contain_text("a")
    tab.page.locator(".user").hover()
    tab.page.get_by_role("button", name="Edit message").click()
    area = tab.page.get_by_role("textbox", name="Edit message")
    area.fill("two")
    area.press("Enter")
    expect(tab.page.locator("#toast")).to_contain_text("An answer is being written")
    expect(area).to_have_value("two")
    held.set()
    tab.wait("done")
    tab.will_answer(["c"])
    area.press("Enter")
    expect(tab.page.locator(".bubble")).to_have_text(["two"])
    tab.wait("done")


def test_a_failed_answer_that_messages_follow_stays_when_it_is_tried_again(tab: Any) -> None:
    held = threading.Event()
    tab.ask("one", [], status=400, error="No.")
    tab.wait("error")
    failed = tab.answer(0)
    tab.ask("two", ["a ", "b"], held=held)
    expect(tab.answer(1).locator(".answer")).to_contain_text("a")
    failed.get_by_role("button", name="Try again").click()
    expect(tab.page.locator("#toast")).to_contain_text("An answer is being written")
    held.set()
    tab.wait("done", 1)
    tab.will_answer(["now"])
    failed.get_by_role("button", name="Try again").click()
    expect(tab.answer(0).locator(".answer")).to_have_text("now")
    tab.wait("done", 0)
    tab.answer(0).get_by_role("button", name="Previous version").click()
    expect(tab.page.locator(".bubble")).to_have_text(["one", "two"])


def test_chats_survive_a_reload(tab: Any) -> None:
    tab.ask("alpha", ["**A**"], thinking=["hm", "m"])
    tab.wait("done")
    stats, thought = tab.answer().locator(".stats").inner_text(), tab.answer().locator("summary").inner_text()
    tab.page.reload()
    answer = tab.wait("done")
    assert answer.locator(".answer strong").inner_text() == "A"
    assert (answer.locator(".stats").inner_text(), answer.locator("summary").inner_text()) == (stats, thought)
    tab.ask("slow", ["x "] * 200, pause=0.05)
    expect(tab.answer().locator(".answer")).to_contain_text("x x")
    tab.page.reload()  # in the middle of an answer: the received part is kept
    assert "x x" in tab.wait("stopped").locator(".answer").inner_text()


def test_several_chats_keep_apart(tab: Any) -> None:
    page = tab.page
    tab.ask("alpha", ["A ", "B ", "C ", "D"], pause=0.2)
    expect(tab.answer().locator(".answer")).to_contain_text("A")
    page.get_by_role("button", name="New chat").first.click()
    expect(page.get_by_role("heading", name="What shall we work out?")).to_be_visible()
    tab.ask("beta", ["E"])
    tab.wait("done")
    titles = page.locator(".chat-open")
    assert titles.all_inner_texts() == ["beta", "alpha"]
    titles.nth(1).click()  # its answer went on meanwhile
    assert tab.wait("done").locator(".answer").inner_text() == "A B C D"
    page.locator(".chat", has_text="beta").hover()
    page.get_by_role("button", name="Rename: beta").click()
    page.get_by_label("Chat title").fill("gamma")
    page.keyboard.press("Enter")
    page.locator(".chat", has_text="gamma").hover()
    page.get_by_role("button", name="Delete: gamma").click()
    expect(titles).to_have_text(["alpha"])
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["gamma", "alpha"])
    assert tab.text() == "E"
    page.locator(".chat", has_text="alpha").hover()
    page.get_by_role("button", name="Delete: alpha").click()
    page.reload()
    assert titles.all_inner_texts() == ["gamma"]
    assert page.evaluate("Object.keys(localStorage).filter(k => k.startsWith('dsv4.chat.')).length") == 1


def test_a_chat_deleted_while_the_model_is_reading_stays_deleted(tab: Any) -> None:
    page = tab.page
    reading = {"prompt_progress": {"total": 9000, "cache": 0, "processed": 1000, "time_ms": 100}}
    tab.ask("slow", ["never"], pause=2.5, progress=[reading] * 3)
    expect(tab.answer().locator(".wait-note")).to_contain_text("Reading 1,000 of 9,000")
    page.wait_for_timeout(1500)  # longer than between saves
    page.locator(".chat", has_text="slow").hover()
    before = tab.mock.disconnects
    page.get_by_role("button", name="Delete: slow").click()
    tab.until(lambda: tab.mock.disconnects >= before + 1)
    # The end of an answer that is not shown is not announced.
    expect(page.locator("#announce")).to_contain_text("Reading")
    assert page.evaluate("Object.keys(localStorage).filter(k => k.startsWith('dsv4.chat.'))") == []
    assert page.locator(".chat-open").count() == 0


def test_switches_and_settings_make_the_request(tab: Any) -> None:
    page = tab.page
    tab.ask("a", ["ok"])
    tab.wait("done", 0)
    page.locator(".segments").get_by_text("Max").click()
    page.get_by_role("button", name="Settings").click()
    page.fill("#system", "Be brief.")
    page.fill("#max-tokens", "77")
    page.locator("#temperature").fill("0.3")
    page.get_by_role("button", name="Done").click()
    tab.ask("b", ["ok"])
    tab.wait("done", 1)
    page.reload()  # the switches are remembered
    page.get_by_role("switch", name="DeepThink").click()
    tab.ask("c", ["ok"])
    tab.wait("done", 2)
    first, second, third = tab.mock.requests
    assert first == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "thinking": {"type": "enabled"},
        "reasoning_effort": "high",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "timings_per_token": True,
    }
    assert second["reasoning_effort"] == "max"
    assert second["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (second["max_tokens"], second["temperature"]) == (77, 0.3)
    assert third["thinking"] == {"type": "disabled"} and "reasoning_effort" not in third


def test_question_before_the_models_are_listed_waits_for_them_and_can_be_stopped(tab: Any) -> None:
    page, held = tab.page, []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    tab.ask("early", ["ok"])
    page.wait_for_timeout(200)
    assert tab.mock.requests == []
    page.get_by_role("button", name="Stop").click()
    tab.wait("stopped", 0)
    tab.ask("again", ["ok"])
    page.wait_for_timeout(200)
    assert tab.mock.requests == []
    held.pop().continue_()
    tab.wait("done", 1)
    assert [request["model"] for request in tab.mock.requests] == [MODEL]


def test_question_after_a_failed_list_of_models_asks_for_it_anew(tab: Any) -> None:
    page = tab.page
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.unroute("**/v1/models")
    tab.ask("hi", ["ok"])
    tab.wait("done")
    assert [request["model"] for request in tab.mock.requests] == [MODEL]


def test_the_chosen_model_is_asked(tab: Any) -> None:
    models = {"data": [{"id": "small"}, {"id": "large"}]}
    tab.page.route("**/v1/models", lambda route: route.fulfill(json=models))
    tab.page.reload()
    tab.page.get_by_role("combobox", name="Model").select_option("large")
    tab.page.reload()  # the choice is remembered
    expect(tab.page.get_by_placeholder("Message large")).to_be_visible()
    tab.ask("hi", ["ok"])
    tab.wait("done")
    assert tab.mock.requests[0]["model"] == "large"


def test_a_server_restarted_with_another_model_is_asked_for_that_one(tab: Any) -> None:
    page = tab.page
    expect(page.locator("#model")).to_have_text(MODEL)
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "newer"}]}))
    tab.ask("hi", [], status=404, error=f"The model `{MODEL}` does not exist.")
    failed = tab.wait("error")
    expect(page.locator("#model")).to_have_text("newer")
    tab.will_answer(["ok"])
    failed.get_by_role("button", name="Try again").click()
    tab.wait("done")
    assert [request["model"] for request in tab.mock.requests] == [MODEL, "newer"]
