"""The list of chats: search, pins, folders; chats as files."""

import json
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from .test_tabs import keep_toasts, stream


def two_chats(tab: Any) -> None:
    tab.ask("about cats", ["They purr, and sleep in the **sun**."], thinking=["Hm."])
    tab.wait("done")
    tab.page.locator("#new-chat").click()
    tab.ask("about dogs", ["They bark."])
    tab.wait("done")


def titles(tab: Any) -> list[str]:
    return tab.page.locator(".chat-open").all_inner_texts()


def test_search_finds_titles_and_messages(tab: Any) -> None:
    two_chats(tab)
    search = tab.page.get_by_role("searchbox", name="Search your chats")
    search.fill("ABOUT")
    assert titles(tab) == ["about dogs", "about cats"]
    search.fill("sun purr")  # in the answer only, in another order
    expect(tab.page.locator(".chat-open")).to_have_text(["about cats"])
    search.fill("sun bark")
    expect(tab.page.get_by_text("No chat has these words.")).to_be_visible()
    search.press("Escape")
    assert titles(tab) == ["about dogs", "about cats"]
    tab.page.locator("#prompt").fill("and birds")
    tab.will_answer(["They sing."])
    tab.page.keyboard.press("Enter")
    tab.wait("done", 1)
    search.fill("sing")  # what came after the first search
    expect(tab.page.locator(".chat-open")).to_have_text(["about dogs"])


def test_pinned_chats_come_first_and_stay_pinned(tab: Any) -> None:
    two_chats(tab)
    tab.page.locator(".chat").nth(1).hover()
    tab.page.get_by_role("button", name="Pin: about cats").click()
    expect(tab.page.locator(".chats h2")).to_have_text(["Pinned", "Today"])
    assert titles(tab) == ["about cats", "about dogs"]
    tab.page.reload()
    expect(tab.page.locator(".chats h2")).to_have_text(["Pinned", "Today"])
    tab.page.get_by_role("button", name="about cats", exact=True).click()
    tab.ask("more", ["Yes."])  # a new message does not lose the pin
    tab.wait("done", 1)
    tab.page.get_by_role("button", name="Unpin: about cats").click()
    expect(tab.page.locator(".chats h2")).to_have_text(["Today"])


def exported(tab: Any, label: str) -> tuple[str, str]:
    tab.page.get_by_role("button", name="Share this chat").click()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name=label).click()
    return download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8")


def test_export_and_import(tab: Any, tmp_path: Path) -> None:
    page = tab.page
    expect(page.locator("#share")).to_be_hidden()
    tab.ask("about cats", ["They purr."], thinking=["Hm."])
    tab.wait("done")
    tab.will_answer(["They meow."])
    page.get_by_role("button", name="Answer again").click()
    expect(tab.answer().locator(".pager")).to_contain_text("2 / 2")
    tab.wait("done")
    name, markdown = exported(tab, "Export Markdown")
    assert name == "about cats.md"
    assert markdown == "# about cats\n\n## You\n\nabout cats\n\n## dsv4-nano\n\nThey meow.\n"
    page.get_by_role("button", name="Share this chat").click()
    page.get_by_role("button", name="Copy as Markdown").click()
    tab.until(lambda: page.evaluate("navigator.clipboard.readText()") == markdown)
    name, text = exported(tab, "Export JSON")
    assert name == "about cats.json"
    file = tmp_path / name
    file.write_text(text)
    page.evaluate("localStorage.clear()")
    page.reload()
    page.set_input_files("#import-file", file)
    assert tab.wait("done").locator(".answer").inner_text() == "They meow."
    page.get_by_role("button", name="Previous version").click()
    assert tab.text() == "They purr."
    page.set_input_files("#import-file", file)  # a second copy beside the first
    expect(page.locator(".chat-open")).to_have_text(["about cats", "about cats"])


def test_damaged_files_are_refused_in_words(tab: Any, tmp_path: Path) -> None:
    node = {"id": "a", "parent": None, "role": "user", "content": "hi"}
    under = node | {"id": "b", "parent": "a"}
    good = {"format": "dsv4.chat", "version": 1, "conversation": {"nodes": {"a": node}}}
    for text, reason in {
        "{": "not JSON",
        "[]": "no exported chat",
        json.dumps(good | {"version": 9}): "no exported chat",
        json.dumps(good | {"conversation": {"nodes": {}}}): "no messages",
        json.dumps(good | {"conversation": {"nodes": {"a": node | {"content": 5}}}}): "a of the file is damaged",
        json.dumps(good | {"conversation": {"nodes": {"a": node | {"parent": "b"}}}}): "no way to the first one",
        json.dumps(good | {"conversation": {"nodes": {"a": node | {"parent": "a"}}}}): "no way to the first one",
        json.dumps(good | {"conversation": {"nodes": {"b": under, "a": None}}}): "b of the file has no way",
    }.items():
        file = tmp_path / "chat.json"
        file.write_text(text)
        tab.page.set_input_files("#import-file", file)
        expect(tab.page.get_by_text(reason)).to_be_visible()
    assert titles(tab) == []


def test_imported_picks_profile_and_settings_are_checked(tab: Any, tmp_path: Path) -> None:
    page = tab.page
    node = {"id": "a", "parent": None, "role": "user", "content": "hi"}
    said = {
        "id": "b",
        "parent": "a",
        "role": "assistant",
        "content": "ok",
        "status": "done",
        "usage": {},
        "timings": None,
    }
    chat = {"nodes": {"a": node, "b": said}, "picked": {"": "a", "a": "b", "b": "a"}, "profile": "constructor"}
    chat["settings"] = {"temperature": "hot", "system": 5, "maxTokens": 7}
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"format": "dsv4.chat", "version": 1, "conversation": chat}))
    page.set_input_files("#import-file", file)
    expect(page.locator(".bubble")).to_have_text(["hi"])
    page.reload()  # the path of the messages ends
    expect(page.locator(".bubble")).to_have_text(["hi"])
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Max tokens")).to_have_value("7")
    page.get_by_role("button", name="Done").click()
    tab.ask("more", ["fine"])
    tab.wait("done", 1)
    assert tab.mock.requests[0]["max_tokens"] == 7 and "temperature" not in tab.mock.requests[0]


def test_a_chat_is_stored_once_the_browser_has_room_again(tab: Any) -> None:
    page = tab.page
    tab.ask("old", ["ok"])
    tab.wait("done")
    page.locator("#new-chat").click()
    fill = """() => {
        const set = Storage.prototype.setItem;
        window.full = true;
        Storage.prototype.setItem = function (...given) {
            if (window.full) throw new DOMException("full", "QuotaExceededError");
            set.apply(this, given);
        };
    }"""
    page.evaluate(fill)
    keep_toasts(page)
    stream(tab, "new")
    expect(page.locator("#toast")).to_contain_text("storage is full")
    page.locator(".chat", has_text="old").hover()
    page.get_by_role("button", name="Delete: old").click()
    page.wait_for_timeout(2500)  # longer than between saves
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    page.evaluate("window.full = false")
    tab.until(lambda: "new" in page.evaluate("localStorage.getItem('dsv4.chats')"))
    page.keyboard.press("Escape")
    tab.wait("stopped")
    expect(page.locator(".chat", has_text="new")).to_be_visible()
