"""The chat page: Enter and Escape that an input method or another part of the page takes."""

import threading
from typing import Any

from playwright.sync_api import Locator, expect


def compose(place: Locator, *keys: str) -> None:
    """Keys that belong to an input method, as Safari reports them."""
    press = """(element, key) => element.dispatchEvent(
        new KeyboardEvent("keydown", { key, keyCode: 229, bubbles: true, cancelable: true }))"""
    for key in keys:
        place.evaluate(press, key)


def test_keys_of_an_input_method_send_and_close_nothing(tab: Any) -> None:
    page = tab.page
    page.fill("#prompt", "one")
    compose(page.locator("#prompt"), "Enter")
    assert page.locator(".user").count() == 0
    tab.ask("one", ["x ", "y"], held=threading.Event())
    expect(tab.answer().locator(".answer")).to_contain_text("x")
    compose(page.locator("#prompt"), "Escape")
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit message").click()
    area = page.get_by_role("textbox", name="Edit message")
    compose(area, "Enter", "Escape")
    expect(area).to_be_visible()
    page.locator(".chat").hover()
    page.get_by_role("button", name="Rename: one").click()
    compose(page.get_by_label("Chat title"), "Enter", "Escape")
    expect(page.get_by_label("Chat title")).to_be_visible()
    assert tab.answer().get_attribute("data-status") == "streaming"
    page.get_by_label("Chat title").press("Escape")
    page.get_by_role("button", name="Stop").click()
    tab.wait("stopped")


def test_escape_meant_for_a_menu_the_search_or_the_drawer_does_not_stop_the_answer(tab: Any) -> None:
    page = tab.page
    tab.ask("one", ["x ", "y"], held=threading.Event())
    expect(tab.answer().locator(".answer")).to_contain_text("x")
    page.get_by_role("button", name="Share this chat").click()
    page.keyboard.press("Escape")
    expect(page.locator("#share-menu")).to_be_hidden()
    for query in ("x", ""):
        page.locator("#search").fill(query)
        page.locator("#search").press("Escape")
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Show sidebar").click()
    page.keyboard.press("Escape")
    expect(page.locator("html")).to_have_attribute("data-sidebar", "closed")
    page.wait_for_timeout(300)
    assert tab.answer().get_attribute("data-status") == "streaming"
    page.locator("#prompt").press("Escape")
    tab.wait("stopped")
