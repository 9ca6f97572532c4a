"""The chat page by axe-core: names, roles and contrast of all on it, in both colour schemes; and the keyboard."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from .conftest import Tab
from .test_tool_calls import PIECES, WEATHER

OPTIONS = {
    "resultTypes": ["violations"],
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
}
RICH = (
    "# Heading\n\nText with `code`, a [link](https://example.com), **bold**, a note[^1] and $x^2$.\n\n"
    "[^1]: The note.\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\n# comment\nprint('x', 1)\n```\n\n- [x] done\n- open\n\n> quote\n\n"
    "```mermaid\ngraph TD\n  A --> B\n```\n"
)


def violations(tab: Any, place: str) -> list[str]:
    """A line per element of the page as it is now that breaks a rule."""
    tab.page.wait_for_timeout(400)  # colours change with a transition
    return [
        f"{place}: {rule['id']}: {node['html'][:160]} {' '.join(node['failureSummary'].split())}"
        for rule in Axe().run(tab.page, options=OPTIONS).response["violations"]
        for node in rule["nodes"]
    ]


SIZES = [(1280, 800), (390, 844)]


@pytest.fixture(params=[(scheme, size) for scheme in ("light", "dark") for size in SIZES], ids=str)
def page_tab(request: pytest.FixtureRequest, browser: Any, mock: Any) -> Iterator[Any]:
    scheme, (width, height) = request.param
    mock.reset()
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce"
    )
    tab = Tab(context, mock.url, mock)
    yield tab
    tab.close()
    context.close()


def test_axe_finds_nothing(page_tab: Any) -> None:
    tab, page = page_tab, page_tab.page
    found: list[str] = []
    expect(page.locator("#model")).to_contain_text("dsv4")
    found += violations(tab, "empty page")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill(json.dumps([WEATHER]) + "x")
    found += violations(tab, "settings")
    page.get_by_label("Tools").fill(json.dumps([WEATHER]))
    page.get_by_role("button", name="Done").click()

    files = [{"name": "a.txt", "mimeType": "text/plain", "buffer": b"ten cats"}]
    page.set_input_files("#attach-files", files)
    page.locator(".attachment summary").click()
    found += violations(tab, "files")
    tab.ask("line\n" * 40, [RICH], thinking=["Let me *think*."])
    tab.wait("done")
    expect(page.locator("figure.diagram img")).to_be_visible(timeout=30_000)
    tab.answer().locator("summary").first.click()
    tab.answer().locator(".stats").click()
    page.locator("#thread").evaluate("e => e.scrollTo(0, 0)")
    found += violations(tab, "answer")
    page.get_by_role("button", name="Share this chat").click()
    found += violations(tab, "menu")
    page.keyboard.press("Escape")
    tab.ask("Oslo?", ["Look."], calls=PIECES, finish="tool_calls")
    tab.wait("done", 1)
    found += violations(tab, "tool calls")
    tab.will_answer([], status=400, error="This model's maximum context length is 9 tokens.")
    page.get_by_role("button", name="Send results").click()
    tab.wait("error", 2)
    found += violations(tab, "failure")
    if page.get_by_role("button", name="Show sidebar").is_visible():
        page.get_by_role("button", name="Show sidebar").click()
    page.locator(".chat").hover()
    found += violations(tab, "list of chats")
    assert not found, "\n".join(found)


def test_everything_is_reached_by_tab_and_focus_is_seen(tab: Any) -> None:
    page = tab.page
    tab.ask("hi", [RICH], thinking=["Hm."], calls=PIECES, finish="tool_calls")
    tab.wait("done")
    expect(page.locator("figure.diagram img")).to_be_visible(timeout=30_000)
    missed = """() => {
        const wanted = [...document.querySelectorAll("button, a[href], input, textarea, select, summary")].filter(
            (e) => e.checkVisibility({ visibilityProperty: true }) && !e.disabled && !e.closest("[inert]") &&
                (e.type !== "radio" || e.checked));
        return wanted.filter((e) => !window.reached.has(e)).map((e) => e.outerHTML.slice(0, 120));
    }"""
    page.evaluate("window.reached = new Set(), document.activeElement.blur()")
    unseen: list[str] = []
    for _ in range(80):
        page.keyboard.press("Tab")
        unseen += page.evaluate(
            """() => {
                const e = document.activeElement;
                window.reached.add(e);
                if (e === document.body || ["TEXTAREA", "INPUT"].includes(e.tagName)) return [];
                const style = getComputedStyle(e);
                return style.outlineStyle === "none" ? [e.outerHTML.slice(0, 120)] : [];
            }"""
        )
    assert page.evaluate(missed) == []
    assert set(unseen) == set()
