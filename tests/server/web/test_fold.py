"""The chat page: long pastes are attachments, long texts are folded, without loss of text."""

from typing import Any

from playwright.sync_api import expect

LOG = "\n".join(f"line {i}" for i in range(312))


def paste(tab: Any, text: str) -> None:
    tab.page.evaluate("text => navigator.clipboard.writeText(text)", text)
    tab.page.locator("#prompt").focus()
    tab.page.keyboard.press("Control+V")


def test_a_long_paste_is_an_attachment_that_folds(tab: Any) -> None:
    page = tab.page
    paste(tab, LOG)
    chips = page.get_by_role("group", name="Files to send")
    expect(chips.locator("summary")).to_have_text("Pasted text312 lines")
    expect(page.locator("#prompt")).to_have_value("")
    chips.locator("summary").press("Enter")
    expect(chips.locator("pre")).to_contain_text("line 311")
    tab.ask("What is it?", ["A log."])
    tab.wait("done")
    assert tab.mock.requests[0]["messages"][0]["content"] == f"{LOG}\n\nWhat is it?"
    expect(chips).to_be_hidden()
    page.reload()
    sent = page.get_by_role("group", name="Attached files")
    expect(sent.locator("pre")).to_be_hidden()
    sent.locator("summary").press("Enter")
    expect(sent.locator("pre")).to_contain_text("line 311")
    page.get_by_role("searchbox").fill("line 311")
    expect(page.locator(".chat-open")).to_have_text(["What is it?"])


def test_a_paste_alone_is_sent_as_it_is(tab: Any) -> None:
    paste(tab, LOG)
    tab.will_answer(["ok"])
    tab.page.keyboard.press("Enter")
    tab.wait("done")
    assert tab.mock.requests[0]["messages"][0]["content"] == LOG
    assert tab.page.locator(".chat-open").inner_text().startswith("line 0 line 1")


def test_a_paste_is_put_into_the_message_or_removed(tab: Any) -> None:
    page = tab.page
    chips = page.get_by_role("group", name="Files to send")
    paste(tab, LOG)
    page.get_by_role("button", name="Remove Pasted text").click()
    expect(chips).to_be_hidden()
    paste(tab, LOG)
    page.get_by_role("button", name="Put the pasted text into the message").click()
    expect(chips).to_be_hidden()
    expect(page.locator("#prompt")).to_have_value(LOG)
    expect(page.locator("#prompt")).to_be_focused()
    paste(tab, "and a short one")
    expect(page.locator("#prompt")).to_have_value(LOG + "and a short one")


def test_a_long_message_folds_in_the_chat(tab: Any) -> None:
    page = tab.page
    tab.ask(LOG, ["ok"])
    tab.wait("done")
    bubble = page.locator(".bubble")
    shown = bubble.get_by_role("button")
    expect(shown).to_have_text("Show all (312 lines)")
    assert "line 7" in bubble.inner_text() and "line 8" not in bubble.inner_text()
    shown.focus()
    page.keyboard.press("Enter")
    assert "line 311" in bubble.inner_text() and shown.get_attribute("aria-expanded") == "true"
    assert page.evaluate("id => Boolean(document.getElementById(id))", shown.get_attribute("aria-controls"))
    shown.press("Enter")
    assert "line 311" not in bubble.inner_text()
    page.locator(".user").hover()
    page.get_by_role("button", name="Copy message").click()
    tab.until(lambda: page.evaluate("navigator.clipboard.readText()") == LOG)


def test_a_dropped_text_folds_in_the_composer_and_opens_by_keyboard(tab: Any) -> None:
    page = tab.page
    area, fold = page.locator("#prompt"), page.locator(".composer .fold")
    area.fill(LOG)
    expect(fold).to_have_text("Show all (312 lines)")
    expect(fold).to_have_attribute("aria-expanded", "false")
    folded = area.bounding_box()["height"]
    tab.until(lambda: page.evaluate("document.querySelector('#prompt').scrollTop") == 0)
    page.keyboard.press("Tab")
    expect(fold).to_be_focused()
    page.keyboard.press("Enter")
    expect(fold).to_have_attribute("aria-expanded", "true")
    assert area.bounding_box()["height"] > folded


def test_long_single_lines_fold_by_characters_and_short_texts_do_not(tab: Any) -> None:
    page = tab.page
    tab.ask("word " * 1000, ["ok"])
    tab.wait("done", 0)
    expect(page.locator(".bubble .fold")).to_have_text("Show all (4,999 characters)")
    tab.ask("\n".join("x" * 20), ["ok"])
    tab.wait("done", 1)
    assert page.locator(".bubble .fold").count() == 1


def test_what_is_typed_line_by_line_does_not_fold_by_itself(tab: Any) -> None:
    area = tab.page.locator("#prompt")
    area.focus()
    for _ in range(25):
        tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("end")
    expect(tab.page.locator(".composer .fold")).to_have_text("Show less")


def test_a_megabyte_is_taken_without_freezing(tab: Any) -> None:
    took, bare = tab.page.evaluate(
        """() => {
            const put = (area, text) => {
                area.value = text;
                area.dispatchEvent(new Event("input"));
                area.scrollHeight;
            };
            const once = (area, text) => {
                put(area, "");
                const start = performance.now();
                put(area, text);
                return performance.now() - start;
            };
            const area = document.querySelector("#prompt");
            const copy = area.cloneNode(); // without the page's listeners
            area.after(copy);
            // The least of up to three: whatever else runs may make one of them longer.
            let [took, bare] = [Infinity, Infinity];
            for (let tries = 0; tries < 3 && !(took < 10 * bare); tries++) {
                bare = Math.min(bare, once(copy, "{ ".repeat(500_000)));
                took = Math.min(took, once(area, "{".repeat(1_000_000)));
            }
            copy.remove();
            return [took, bare];
        }"""
    )
    assert took < 10 * bare, "far longer than the browser takes for a megabyte of words"
    tab.will_answer(["ok"])
    tab.page.locator("#prompt").press("Enter")
    tab.wait("done")
    assert len(tab.mock.requests[0]["messages"][0]["content"]) == 1_000_000
    expect(tab.page.locator(".bubble .fold")).to_have_text("Show all (1,000,000 characters)")


def test_fences_of_a_message_are_blocks_of_code(tab: Any) -> None:
    tab.ask("Why?\n```js\na -> b;\n\n  c();\n```\nand ``x``\n```\nnever closed", ["So."])
    tab.wait("done")
    bubble = tab.page.locator(".bubble > div")
    assert bubble.locator("pre").all_inner_texts() == ["a -> b;\n\n  c();"]
    assert bubble.inner_text().endswith("and ``x``\n```\nnever closed")
    assert '"calt" 0' in bubble.evaluate("e => getComputedStyle(e).fontFeatureSettings")
