"""The chat page in two tabs: what is typed, named, chosen or deleted in one while the other streams."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from .test_tool_calls import ask_and_call

STORED = "Object.keys(localStorage).filter((name) => name.startsWith('dsv4.chat.'))"


@pytest.fixture
def other(tab: Any) -> Iterator[Any]:
    """A second page beside the tab; a test opens it with `goto`."""
    page = tab.page.context.new_page()
    page.set_default_timeout(10_000)
    yield page
    page.close()


def stream(tab: Any, text: str) -> None:
    """Asks for an answer that grows, and is stored, until it is stopped: it would last half an hour."""
    tab.ask(text, [f"{i} " for i in range(9000)], pause=0.2)


def keep_toasts(page: Any) -> None:
    """Toasts stay: a loaded machine may need longer than the six seconds of one."""
    page.evaluate("""() => {
        const real = setTimeout;
        window.setTimeout = (run, ms, ...given) => (ms === 6000 ? 0 : real(run, ms, ...given));
    }""")


def test_what_is_typed_in_one_tab_stays_while_another_streams(tab: Any, other: Any) -> None:
    ask_and_call(tab)
    other.goto(tab.url)
    other.get_by_label("Result of weather").fill("half a result")
    other.locator(".user").hover()
    other.get_by_role("button", name="Edit message").click()
    area = other.get_by_role("textbox", name="Edit message")
    area.fill("half an edit")
    stream(tab, "Never mind.")
    for shown in ("0 1", "12 13"):  # it follows
        expect(other.locator(".answer").nth(1)).to_contain_text(shown, timeout=20_000)
    expect(area).to_have_value("half an edit")
    expect(area).to_be_focused()
    expect(other.get_by_label("Result of weather")).to_have_value("half a result")
    tab.page.keyboard.press("Escape")
    expect(other.locator(".assistant").nth(1)).to_have_attribute("data-status", "stopped", timeout=20_000)


def test_a_chat_named_and_pinned_while_another_tab_streams_stays_so(tab: Any, other: Any) -> None:
    stream(tab, "one")
    expect(tab.answer().locator(".answer")).to_contain_text("0")
    other.goto(tab.url)
    other.locator(".chat").hover()
    other.get_by_role("button", name="Rename: one").click()
    field = other.get_by_label("Chat title")
    field.fill("named")
    other.wait_for_timeout(2500)  # longer than between saves
    expect(field).to_be_focused()
    field.press("Enter")
    expect(other.locator(".chat-open")).to_have_text(["named"])
    expect(other.locator(".chat-open")).to_be_focused()
    other.get_by_role("button", name="Pin: named").click()
    expect(other.get_by_role("button", name="Unpin: named")).to_be_focused()
    other.wait_for_timeout(2500)
    tab.page.keyboard.press("Escape")
    tab.wait("stopped")
    for page in (tab.page, other):
        page.reload()
        expect(page.locator(".chat-open")).to_have_text(["named"])
        expect(page.locator(".chats h2")).to_have_text(["Pinned"])


def test_a_chat_deleted_in_another_tab_is_not_stored_again(tab: Any, other: Any) -> None:
    stream(tab, "one")
    expect(tab.answer().locator(".answer")).to_contain_text("0")
    other.goto(tab.url)
    keep_toasts(other)
    other.locator(".chat").hover()
    other.get_by_role("button", name="Delete: one").click()
    other.wait_for_timeout(2500)  # longer than between saves
    tab.page.goto(tab.url + "web/logo.svg")
    assert other.evaluate(STORED) == []
    other.get_by_role("button", name="Undo").click()
    expect(other.locator(".chat-open")).to_have_text(["one"])
    assert len(other.evaluate(STORED)) == 1


def test_chats_cleared_in_another_tab_are_not_stored_again(tab: Any, other: Any) -> None:
    stream(tab, "one")
    expect(tab.answer().locator(".answer")).to_contain_text("0")
    other.goto(tab.url)
    # Right after a save: the next one is a second away, and the other tab knows by then.
    clear = """() => new Promise((resolve) =>
        addEventListener("storage", () => resolve(localStorage.clear()), { once: true }))"""
    other.evaluate(clear)
    other.wait_for_timeout(2500)  # longer than between saves
    assert tab.page.evaluate(STORED) == []
    tab.page.keyboard.press("Escape")
    tab.wait("stopped")
    assert tab.page.evaluate(STORED) == []
    tab.ask("two", ["ok"])  # in the chat that was cleared
    tab.wait("done", 1)
    assert len(tab.page.evaluate(STORED)) == 1


def test_a_title_left_as_it_was_does_not_undo_that_of_another_tab(tab: Any, other: Any) -> None:
    def begin(page: Any, title: str) -> Any:
        page.locator(".chat").hover()
        page.get_by_role("button", name=f"Rename: {title}").click()
        return page.get_by_label("Chat title")

    tab.ask("one", ["ok"])
    tab.wait("done")
    other.goto(tab.url)
    old = "one"
    for key, title in (("Enter", "two"), ("Escape", "three")):
        field = begin(other, old)
        begin(tab.page, old).fill(title)
        tab.page.keyboard.press("Enter")
        field.press(key)
        for page in (tab.page, other):
            expect(page.locator(".chat-open")).to_have_text([title])
        expect(other.locator(".chat-open")).to_be_focused()
        old = title


def test_switches_are_shown_as_another_tab_has_set_them(tab: Any, other: Any) -> None:
    other.goto(tab.url)
    other.locator(".segments").get_by_text("Max").click()
    expect(tab.page.get_by_role("radio", name="Max")).to_be_checked()
    other.get_by_role("switch", name="DeepThink").click()
    expect(tab.page.get_by_role("switch", name="DeepThink")).to_have_attribute("aria-checked", "false")
    tab.ask("one", ["ok"])
    tab.wait("done")
    assert tab.mock.requests[0]["thinking"] == {"type": "disabled"}
