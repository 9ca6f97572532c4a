"""The inspector's panel, with the embedded model and the real server."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Locator, Route, expect

from dsv4.engine import LLM
from dsv4.engine.draft_length import FixedLength
from dsv4.model_folder import resolve_model
from tests.server.conftest import Served, serving

from .conftest import Tab
from .test_accessibility import violations

DAYS = [f"Day {day}: we walked {day * 3} km." for day in range(60)]
LONG = "\n".join([*DAYS[:30], "The secret word of Anna is river.", *DAYS[30:]]) + "\n\nWhat is the secret word of Anna?"
ENDED = re.compile("^(done|length)$")


def ask_briefly(tab: Any, text: str) -> None:
    """Asks for few tokens: beside a long answer, which nano gives now and then, a prompt's beginning is not drawn."""
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.fill("#max-tokens", "60")
    tab.page.get_by_role("button", name="Done").click()
    tab.ask(text)
    expect(tab.answer()).to_have_attribute("data-status", ENDED, timeout=60_000)


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with serving(LLM(resolve_model(None), max_num_seqs=2, max_model_len=4096)) as served:
        yield served


def heat(token: Locator) -> tuple[float, float]:
    """Strength of a token's colours: window, entries."""
    values = token.evaluate("e => [e.style.getPropertyValue('--near'), e.style.getPropertyValue('--far')]")
    return float(values[0] or 0), float(values[1] or 0)


def test_layers_experts_and_text_of_an_answer(open_tab: Callable[[str], Any], nano: Served) -> None:
    tab = open_tab(nano.url + "/")
    page = tab.page
    ask_briefly(tab, LONG)
    tab.answer().get_by_role("button", name="Inspect answer").click()
    panel = page.get_by_role("complementary", name="Inspector")
    rows = panel.locator(".layer-row")
    expect(rows).to_have_count(6, timeout=30_000)
    assert panel.locator(".layer-kind").all_inner_texts() == ["SWA", "SWA", "CSA", "HCA", "CSA", "HCA"]
    expect(rows.nth(2)).to_contain_text("128 + 128/")
    assert rows.nth(3).locator(".experts rect").count() == 2
    facts = panel.locator("#inspector-facts")
    expect(facts).to_contain_text("index keys")
    expect(facts).to_contain_text("none (dsv4 serve --speculate K")

    # The chosen token is the answer's first: the computation read the prompt up to the one before.
    chosen = panel.locator(".token.chosen")
    expect(chosen).to_have_count(1)
    at = int(chosen.get_attribute("data-at") or 0)
    text = panel.locator("#inspector-text").inner_text()
    assert "<|User|>" in text and "\uff5c" not in text
    assert panel.locator(".token.written").first.get_attribute("data-at") == str(at)
    before, early = panel.locator(f".token[data-at='{at - 1}']"), panel.locator(f".token[data-at='{at - 300}']")
    rows.nth(0).hover()  # window only
    assert heat(before)[0] > 0 and heat(early) == (0, 0) and heat(chosen) == (0, 0)
    rows.nth(3).hover()  # all entries of 128 tokens
    assert heat(early)[0] == 0 < heat(early)[1]

    rows.nth(4).click()
    detail = panel.locator(".layer-detail:visible")
    expect(detail).to_contain_text("Experts by score")
    assert detail.locator("tbody tr").count() == 8
    assert "Day" in detail.locator("tbody").inner_text() or "walked" in detail.locator("tbody").inner_text()
    rows.nth(0).click()
    expect(panel.locator(".layer-detail:visible")).to_contain_text("Experts by token id")

    panel.locator("#inspector-text").focus()
    page.keyboard.press("ArrowRight")
    expect(panel.locator(".token.chosen")).to_have_attribute("data-at", str(at + 1))
    expect(panel.get_by_role("status")).to_contain_text("Shown is the step")
    expect(panel.locator(".next-tokens li")).to_have_count(5)
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    assert tab.answer().get_by_role("button", name="Inspect answer").evaluate("e => e === document.activeElement")


def test_a_trace_that_is_refused_for_another_is_asked_for_again(open_tab: Callable[[str], Any], nano: Served) -> None:
    tab, refusals = open_tab(nano.url + "/"), list[str]()

    def refuse_once(route: Route) -> None:
        if refusals:
            route.continue_()
            return
        refusals.append(route.request.url)
        error = {"error": {"message": "A token is being traced for you."}}
        route.fulfill(status=429, headers={"Retry-After": "1"}, json=error)

    tab.page.route("**/inspect/*/*", refuse_once)
    tab.ask("hi")
    expect(tab.answer()).to_have_attribute("data-status", ENDED, timeout=60_000)
    tab.answer().get_by_role("button", name="Inspect answer").click()
    expect(tab.page.locator("#inspector-note")).to_contain_text("Shown is the step", timeout=30_000)
    assert len(refusals) == 1 and tab.page.locator(".layer-row").count() == 6


def test_an_answer_that_the_server_has_forgotten_says_so(tab: Any) -> None:
    tab.mock.answer_id = "gone"
    tab.ask("hi", ["there"])
    tab.wait("done").get_by_role("button", name="Inspect answer").click()
    expect(tab.page.locator("#inspector-note.failed")).to_contain_text("Not Found")
    tab.page.get_by_role("button", name="Close inspector").click()
    tab.mock.answer_id = ""
    tab.ask("again", ["there"])
    expect(tab.wait("done", 1).get_by_role("button", name="Inspect answer")).to_be_hidden()


def test_a_long_answer_is_drawn_about_the_chosen_token(tab: Any) -> None:
    def traced(position: int) -> dict[str, Any]:
        return {"position": position, "layers": [], "next_tokens": [], "cache_bytes": {"window": 0}}

    pieces = [f" {place}" for place in range(5000)]
    shape = {"window": 128, "layers": [], "index_topk": 1, "num_experts": 1, "experts_per_token": 1}
    drafts = {"accepted_drafts": [], "num_draft_tokens": 0, "num_accepted_tokens": 0}
    counts = {"prompt_tokens": 1000, "cached_tokens": 0, "answer_tokens": 4000}
    answer = {"id": "long", "pieces": pieces, **shape, **drafts, **counts}
    tab.page.route("**/inspect/*", lambda route: route.fulfill(json=answer))
    tab.page.route("**/inspect/*/*", lambda route: route.fulfill(json=traced(int(route.request.url.split("/")[-1]))))
    tab.mock.answer_id = "long"
    tab.ask("hi", ["there"])
    tab.wait("done").get_by_role("button", name="Inspect answer").click()
    panel = tab.page.get_by_role("complementary", name="Inspector")
    chosen = panel.locator(".token.chosen")
    expect(chosen).to_have_attribute("data-at", "1000")
    expect(panel.locator("#inspector-note")).to_contain_text("Token 1,001 of 5,000, written by the model")
    assert panel.locator(".inspector-cut").all_inner_texts() == [
        "250 earlier tokens are not drawn.",
        "3,250 later tokens are not drawn.",
    ]
    panel.locator(".token[data-at='1749']").click()
    panel.locator("#inspector-text").focus()
    tab.page.keyboard.press("ArrowRight")
    expect(chosen).to_have_attribute("data-at", "1750")
    expect(panel.locator(".token").first).to_have_attribute("data-at", "1000")
    expect(panel.locator(".token.written").first).to_have_attribute("data-at", "1000")
    expect(panel.locator("#inspector-note")).to_contain_text("Token 1,751 of 5,000")


@pytest.mark.parametrize("tab", [{"viewport": {"width": 390, "height": 844}}], indirect=True)
def test_the_panel_covers_a_phone(tab: Any) -> None:
    tab.mock.answer_id = "gone"
    tab.ask("hi", ["there"])
    tab.wait("done").get_by_role("button", name="Inspect answer").click()
    box = tab.page.locator("#inspector").bounding_box()
    assert (box["x"], box["width"]) == (0, 390)
    assert tab.page.evaluate("document.querySelector('#inspector').scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_panel(browser: Browser, nano: Served, scheme: Literal["light", "dark"]) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    tab = Tab(context, nano.url + "/")
    ask_briefly(tab, LONG)
    tab.answer().get_by_role("button", name="Inspect answer").click()
    rows = tab.page.locator(".layer-row")
    expect(rows).to_have_count(6, timeout=30_000)
    rows.nth(2).click()
    found = violations(tab, "inspector")
    assert not found, "\n".join(found)
    tab.close()
    context.close()


def test_drafts_of_an_answer_are_shown(open_tab: Callable[[str], Any]) -> None:
    llm = LLM(resolve_model(None), max_num_seqs=2, max_model_len=4096, speculate=3)
    assert llm.core.speculator is not None
    llm.core.speculator.lengths = FixedLength(3)
    with serving(llm) as served:
        tab = open_tab(served.url + "/")
        ask_briefly(tab, "What is 12 + 30?")
        tab.answer().locator(".stats").click()
        text = tab.answer().locator(".answer-details").inner_text()
        told = re.search(r"(\d+) of (\d+) tokens accepted", text)
        assert told is not None and 0 < int(told[1]) <= int(told[2]), text
        tab.answer().get_by_role("button", name="Inspect answer").click()
        expect(tab.page.locator(".layer-row")).to_have_count(6, timeout=30_000)
        facts = tab.page.locator("#inspector-facts")
        expect(facts).to_contain_text(f"{told[1]} of {told[2]} drafted tokens accepted (underlined)")
        expect(tab.page.locator(".token.drafted")).to_have_count(int(told[1]))
