"""Text files beside a message: chips, the prompt, what is refused, edits and reloads."""

from typing import Any

from playwright.sync_api import expect

from .test_fold import paste


def attach(tab: Any, *files: tuple[str, bytes]) -> None:
    tab.page.set_input_files(
        "#attach-files", [{"name": name, "mimeType": "text/plain", "buffer": data} for name, data in files]
    )


PROMPT = "[file name]: a.txt\n[file content begin]\nten cats\n[file content end]\n"


def test_files_are_sent_before_the_question_and_unfold(tab: Any) -> None:
    page = tab.page
    attach(tab, ("a.txt", b"ten cats"), ("b.csv", "ä,ö\n".encode()))
    chips = page.get_by_role("group", name="Files to send")
    expect(chips.locator(".file")).to_have_count(2)
    chips.locator("summary").first.click()
    expect(chips.locator("pre").first).to_have_text("ten cats")
    page.get_by_role("button", name="Remove b.csv").click()
    tab.ask("How many?", ["Ten."])
    tab.wait("done")
    assert tab.mock.requests[0]["messages"] == [{"role": "user", "content": f"{PROMPT}How many?"}]
    expect(chips).to_be_hidden()
    assert page.locator(".bubble").inner_text() == "How many?"
    page.reload()  # stored with the chat
    file = page.get_by_role("group", name="Attached files").locator("details")
    file.locator("summary").click()
    expect(file.locator("pre")).to_have_text("ten cats")
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit message").click()
    area = page.get_by_role("textbox", name="Edit message")
    expect(area).to_have_value("How many?")
    area.fill("Which?")
    tab.will_answer(["Cats."])
    area.press("Enter")
    tab.until(lambda: len(tab.mock.requests) == 2)
    assert tab.mock.requests[1]["messages"] == [{"role": "user", "content": f"{PROMPT}Which?"}]


def test_a_file_alone_is_a_message(tab: Any) -> None:
    attach(tab, ("a.txt", b"ten cats"))
    tab.will_answer(["Ten."])
    tab.page.get_by_role("button", name="Send message").click()
    tab.wait("done")
    assert tab.mock.requests[0]["messages"][0]["content"] == PROMPT
    assert tab.page.locator(".chat-open").inner_text() == "a.txt"
    expect(tab.page.locator(".bubble")).to_be_hidden()


# Files are read only once window.release() was called.
SLOW = """() => {
    const read = Blob.prototype.arrayBuffer;
    const released = new Promise((resolve) => { window.release = resolve; });
    Blob.prototype.arrayBuffer = async function () {
        await released;
        return read.call(this);
    };
}"""


def test_files_that_are_still_being_read_go_with_the_message(tab: Any) -> None:
    page = tab.page
    page.evaluate(SLOW)
    attach(tab, ("a.txt", b"ten cats"))
    paste(tab, "long\n" * 40)  # while the file is read
    tab.ask("How many?", ["Ten."])
    page.evaluate("window.release()")
    tab.wait("done")
    expect(page.locator("#attached")).to_be_hidden()
    content = tab.mock.requests[0]["messages"][0]["content"]
    assert content.endswith("How many?") and PROMPT in content and "long\nlong" in content


def test_a_message_that_waits_for_its_files_does_not_go_to_a_chat_opened_meanwhile(tab: Any) -> None:
    page = tab.page
    tab.ask("one", ["ok"])
    tab.wait("done")
    page.evaluate(SLOW)
    attach(tab, ("a.txt", b"ten cats"))
    tab.ask("How many?", ["Ten."])
    page.locator("#new-chat").click()
    page.evaluate("window.release()")
    expect(page.locator("#attached")).to_be_visible()
    expect(page.locator("#prompt")).to_have_value("How many?")
    assert len(tab.mock.requests) == 1
    page.keyboard.press("Enter")
    tab.wait("done")
    expect(page.locator(".bubble")).to_have_text(["How many?"])
    assert len(tab.mock.requests) == 2


def test_what_is_no_text_is_refused_in_words(tab: Any) -> None:
    for name, data, reason in (
        ("image.png", b"\x89PNG\xff", "image.png is no text in UTF-8."),
        ("zero.txt", b"a\0b", "zero.txt is no text in UTF-8."),
        ("big.txt", b"a" * 2_000_001, "big.txt has 2.0 MB; up to 2.0 MB can be attached."),
    ):
        attach(tab, (name, data))
        expect(tab.page.get_by_text(reason)).to_be_visible()
    expect(tab.page.locator("#attached")).to_be_hidden()
    expect(tab.page.get_by_role("button", name="Send message")).to_be_disabled()
