"""The chat page: status of waiting and speed, busy and stopped servers, and changes by other tabs."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect


def reading(processed: int, total: int = 50_000, cache: int = 0, ms: float = 3000.0) -> dict[str, Any]:
    return {"prompt_progress": {"total": total, "cache": cache, "processed": processed, "time_ms": ms}}


def queued(position: int) -> dict[str, Any]:
    return reading(0, ms=0.0) | {"queue": {"position": position, "time_ms": 0.0}}


def seconds_in(note: Any) -> int:
    """The number of seconds in a status, -1 for one without."""
    found = re.search(r"(\d+) s\b", note.inner_text())
    return int(found[1]) if found else -1


def test_place_in_the_queue_and_reading_are_shown_until_the_answer(tab: Any) -> None:
    waits, next_in_line, reads = (threading.Event() for _ in range(3))  # each state stays until it was seen
    progress = [queued(3), waits, queued(0), next_in_line, reading(12_288, ms=20_000), reads, reading(50_000)]
    tab.ask("hi", ["Done."], progress=progress)
    note, bar = tab.answer().locator(".wait-note"), tab.page.get_by_role("progressbar")
    expect(note).to_have_text("Waiting: 3 ahead")
    expect(bar).to_be_hidden()
    waits.set()
    expect(note).to_have_text("Waiting: next in line")
    next_in_line.set()
    expect(note).to_have_text(re.compile(r"^Reading 12,288 of 50,000 tokens \(24 %\), about [1-6]\d s left$"))
    assert bar.get_attribute("aria-valuenow") == "24"
    told = seconds_in(note)
    tab.until(lambda: 0 <= seconds_in(note) < told)  # it counts down between two reports
    reads.set()
    tab.wait("done")
    assert tab.text() == "Done." and tab.answer().locator(".waiting").is_hidden()


@pytest.mark.parametrize(
    ("tokens", "milliseconds", "expected"),
    [
        (32, 0.0, "32 tokens"),  # all tokens at the same time by the clock
        (32, 0.5, "32 tokens"),  # too short to measure
        (4, 100.0, "4 tokens"),  # too few tokens
        (1, 100.0, "1 token"),
        (32, 20.0, "32 tokens · 50.0 tokens/s"),
        (40, 2.0, "40 tokens · 500 tokens/s"),
    ],
)
def test_speed_is_the_engine_s_and_only_where_there_is_one(
    tab: Any, tokens: int, milliseconds: float, expected: str
) -> None:
    tab.ask("hi", ["x "] * tokens, milliseconds=milliseconds)  # all pieces arrive at once
    assert tab.wait("done").locator(".stats").inner_text() == expected


def test_short_thinking_shows_no_duration(tab: Any) -> None:
    tab.ask("hi", ["ok"], thinking=["hm"], milliseconds=1.0)
    expect(tab.wait("done").locator("summary")).to_have_text("Thoughts")
    tab.ask("hi", ["ok"], thinking=["\n", " "])
    tab.wait("done", 1)
    assert tab.answer().locator("details.thinking").is_hidden(), "blank thinking is none"


def test_a_busy_server_is_retried_after_its_retry_after(tab: Any) -> None:
    tab.ask("hi", [], status=429, error="Too many requests wait.", headers={"Retry-After": "60"})
    note = tab.answer().locator(".wait-note")
    expect(note).to_have_text(re.compile(r"^The server is busy, trying again in (60|[345]\d) s$"))
    told = seconds_in(note)
    tab.until(lambda: 0 <= seconds_in(note) < told)
    tab.page.get_by_role("button", name="Stop").click()
    tab.wait("stopped")
    assert len(tab.mock.requests) == 1
    tab.ask("again", [], status=429, error="Wait.", headers={"Retry-After": "1"}, then=["fine"])
    assert tab.wait("done", 1).locator(".answer").inner_text() == "fine"
    assert len(tab.mock.requests) == 3
    tab.ask("more", [], status=503, error="Later.", headers={"Retry-After": "60"})
    expect(tab.answer().locator(".wait-note")).to_contain_text("trying again in")
    tab.page.get_by_role("button", name="Stop").click()
    tab.wait("stopped")
    assert len(tab.mock.requests) == 4


def test_a_stopped_engine_is_not_called_busy(tab: Any) -> None:
    tab.mock.stopped = "the logits of request 7 are not finite"
    tab.ask("hi", [], status=503, error="the engine has failed", headers={"Retry-After": "1"})
    failure = tab.wait("error").locator(".failure")
    expect(failure.locator("strong")).to_have_text("The model has stopped")
    expect(failure.locator("p")).to_contain_text("The logits of request 7 are not finite.")
    banner = tab.page.locator("#banner")
    expect(banner).to_contain_text("The model has stopped")
    assert len(tab.mock.requests) == 1, "waiting does not help, so nothing is asked again"
    tab.mock.stopped = ""
    tab.will_answer(["back"])
    expect(banner).to_be_hidden()  # the page notices by itself
    failure.get_by_role("button", name="Try again").click()
    assert tab.wait("done").locator(".answer").inner_text() == "back"


def test_reload_and_stop_before_the_answer_leave_a_way_on(tab: Any) -> None:
    tab.ask("slow", ["never"], pause=2.0, progress=[queued(2)] * 30)
    expect(tab.answer().locator(".wait-note")).to_have_text("Waiting: 2 ahead")
    tab.page.reload()
    answer = tab.wait("stopped")
    assert "before the answer began" in answer.locator(".notice").inner_text()
    tab.until(lambda: tab.mock.disconnects == 1)
    tab.will_answer(["fine"])
    answer.get_by_role("button", name="Answer again").click()
    assert tab.wait("done").locator(".answer").inner_text() == "fine"


def test_two_tabs_on_one_chat_keep_what_both_have_asked(tab: Any, open_tab: Callable[[str], Any]) -> None:
    tab.ask("first", ["one"])
    tab.wait("done", 0)
    other = tab.page.context.new_page()
    other.goto(tab.url)
    expect(other.locator(".answer")).to_have_text("one")
    seen = threading.Event()
    tab.ask("second", ["a ", "b ", "c ", "d"], pause=1.0, held=seen)
    expect(other.locator(".bubble")).to_have_text(["first", "second"])
    expect(other.locator(".assistant").nth(1)).to_have_attribute("data-status", "streaming")
    seen.set()
    expect(other.locator(".answer").nth(1)).to_have_text("a b c d", timeout=20_000)  # the second tab follows
    expect(other.locator(".assistant").nth(1)).to_have_attribute("data-status", "done", timeout=20_000)
    other.fill("#prompt", "third")
    other.keyboard.press("Enter")
    expect(tab.page.locator(".bubble")).to_have_text(["first", "second", "third"], timeout=20_000)
    expect(tab.page.locator(".assistant").nth(2)).to_have_attribute("data-status", "done", timeout=20_000)
    tab.page.reload()
    expect(tab.page.locator(".bubble")).to_have_text(["first", "second", "third"])
    other.close()


def test_an_answer_that_ends_in_the_millisecond_of_a_save_ends_in_other_tabs_too(tab: Any) -> None:
    tab.ask("first", ["one"])
    tab.wait("done", 0)
    other = tab.page.context.new_page()
    other.goto(tab.url)
    tab.page.evaluate("{ const still = Date.now(); Date.now = () => still; }")
    tab.ask("second", ["two"], pause=1.0)
    expect(other.locator(".assistant").nth(1)).to_have_attribute("data-status", "done")
    other.close()


def test_queue_and_prompt_of_the_real_engine_are_shown_and_stopped_at_once(
    open_tab: Callable[[str], Any], serve: Any, model: Any
) -> None:
    model.seconds_per_step = model.seconds_of_prefill = 2.0  # the prompt takes much longer than all that is done here
    model.reply = "</think>" + "cat " * 100
    with serve(model, max_num_seqs=1, max_model_len=65536) as served:
        tab = open_tab(served.url + "/")
        expect(tab.page.locator("#model")).to_have_text(served.engine.llm.name)
        tab.ask("the cat sat " * 16_000)
        note = tab.answer().locator(".wait-note")
        expect(note).to_contain_text("Reading")
        tab.page.get_by_role("button", name="New chat").first.click()
        tab.ask("next")
        expect(tab.answer().locator(".wait-note")).to_have_text("Waiting: next in line")
        tab.page.get_by_role("button", name="Stop").click()
        tab.until(lambda: served.engine.num_waiting == 0)
        assert served.engine.num_running == 1
        tab.page.locator(".chat-open").nth(1).click()
        expect(note).to_contain_text("Reading")
        tab.page.keyboard.press("Escape")
        tab.wait("stopped")
        served.wait_until_idle()
        assert model.num_sampled == 0, "the prompt was not read to its end"


def test_details_of_an_answer(tab: Any) -> None:
    describe = """async (node) => (await import("/web/js/figures.js")).describeDetails(node)"""
    timings = {"prompt_n": 800, "prompt_ms": 400, "prompt_per_second": 2000.0, "queue_ms": 5.0}
    timings |= {"draft_n": 30, "draft_n_accepted": 21}
    usage = {"prompt_tokens": 1200, "completion_tokens": 64, "prompt_tokens_details": {"cached_tokens": 400}}
    usage["completion_tokens_details"] = {"reasoning_tokens": 20}
    cost = {"model": "deepseek-v4-pro", "usd": 0.00012345}
    node = {"model": "nano", "usage": usage, "timings": timings, "officialCost": cost}
    assert tab.page.evaluate(describe, node) == [
        ["Model", "nano"],
        ["Prompt", "1,200 tokens, 400 of them cached, read in 0.4 s, 2,000 tokens/s"],
        ["Answer", "64 tokens, 20 of them reasoning"],
        ["Drafts", "21 of 30 tokens accepted"],
        ["On DeepSeek's API", "$0.00012 (as deepseek-v4-pro)"],
    ]
    assert tab.page.evaluate(describe, {"model": "nano"}) == [["Model", "nano"]]
    stopped = {"model": "nano", "officialCost": cost, "timings": {"cache_n": 400, "prompt_n": 800, "predicted_n": 7}}
    assert tab.page.evaluate(describe, stopped) == [
        ["Model", "nano"],
        ["Prompt", "1,200 tokens, 400 of them cached"],
        ["Answer", "7 tokens"],
        ["On DeepSeek's API", "$0.00012 (as deepseek-v4-pro)"],
    ]
