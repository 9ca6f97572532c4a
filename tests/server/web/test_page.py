"""The chat page: failures, an unreachable server, keyboard, colours and small screens."""

import threading
from typing import Any

import pytest
from playwright.sync_api import expect

TOP = "document.querySelector('#thread').scrollTop"
LEFT = "(t => t.scrollHeight - t.scrollTop - t.clientHeight)(document.querySelector('#thread'))"  # to the end


def settled(page: Any, wanted: str) -> Any:
    """A value of the page once two looks at it agree: a wheel scrolls smoothly."""
    value = page.evaluate(wanted)
    while True:
        page.wait_for_timeout(300)
        before, value = value, page.evaluate(wanted)
        if before == value:
            return value


@pytest.mark.parametrize(
    ("script", "title", "detail"),
    [
        ({"status": 400, "error": "Invalid top_p value"}, "The server refused the request", "Invalid top_p value"),
        (
            {"status": 400, "error": "This model's maximum context length is 9 tokens."},
            "This message is too long",
            "is 9 tokens",
        ),
        ({"status": 429, "error": "Slow down."}, "The server is busy", "Slow down."),
        ({"status": 500, "error": "Out of memory"}, "The server failed", "Out of memory"),
        ({"cut": True}, "The answer was cut off", "The connection ended"),
    ],
    ids=["400", "context", "429", "500", "cut"],
)
def test_failures_are_shown_and_can_be_retried(tab: Any, script: dict[str, Any], title: str, detail: str) -> None:
    tab.ask("hi", ["half"], **script)
    failure = tab.wait("error").locator(".failure")
    assert title in failure.locator("strong").inner_text() and detail in failure.locator("p").inner_text()
    assert tab.text().strip() == ("half" if "cut" in script else "")
    tab.will_answer(["fine"])
    if "too long" in title:
        failure.get_by_role("button", name="New chat").click()
        expect(tab.page.locator(".welcome")).to_be_visible()
        return
    failure.get_by_role("button", name="Try again").click()
    assert tab.wait("done").locator(".answer").inner_text() == "fine"


def test_a_refusal_that_is_cut_off_can_be_retried(tab: Any) -> None:
    cut = """() => {
        const real = window.fetch;
        window.fetch = (path, options) => {
            if (!path.includes("completions")) return real(path, options);
            window.fetch = real;
            const body = new ReadableStream({ pull: (controller) => controller.error(new TypeError("cut")) });
            return Promise.resolve(new Response(body, { status: 400 }));
        };
    }"""
    tab.page.evaluate(cut)
    tab.ask("hi", ["fine"])
    failure = tab.wait("error").locator(".failure")
    expect(failure).to_contain_text("The connection was lost.")
    failure.get_by_role("button", name="Try again").click()
    tab.wait("done")


def test_text_from_right_to_left_is_laid_out_so_and_code_is_not(tab: Any) -> None:
    page = tab.page
    tab.ask(
        "\u05e9\u05dc\u05d5\u05dd", ["\u05e9\u05dc\u05d5\u05dd `a.b` $x^2$\n\n- \u05d0\n\nplain\n\n```\nx = 1\n```\n"]
    )
    answer = tab.wait("done")
    direction = "e => getComputedStyle(e).direction"
    assert page.locator(".bubble > div").evaluate(direction) == "rtl"
    for place, expected in {"p": "rtl", "ul": "rtl", "p > code": "ltr", ".math": "ltr", "pre": "ltr"}.items():
        assert answer.locator(f".answer {place}").first.evaluate(direction) == expected, place
    assert answer.locator(".answer p").last.evaluate(direction) == "ltr"
    page.fill("#prompt", "\u05d0")
    assert page.locator("#prompt").evaluate(direction) == "rtl"


def test_server_away_and_back(tab: Any) -> None:
    page = tab.page
    page.route("**/v1/**", lambda route: route.abort())
    page.reload()
    expect(page.locator("#banner")).to_contain_text("The server cannot be reached")
    tab.ask("hi", ["back"])
    expect(tab.wait("error").locator(".failure")).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/**")
    page.locator("#banner").get_by_role("button", name="Try again").click()
    expect(page.locator("#banner")).to_be_hidden()
    tab.answer().get_by_role("button", name="Try again").click()
    tab.wait("done")


def test_keyboard_and_labels(tab: Any) -> None:
    page = tab.page
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    tab.will_answer(["ok"], finish="length")
    page.keyboard.press("Enter")
    tab.wait("length")
    assert tab.mock.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert "token limit" in tab.answer().locator(".notice").inner_text()
    nameless = (
        "[...document.querySelectorAll('button')].filter(b => !b.ariaLabel && !b.textContent.trim()).map(b => b.id)"
    )
    assert page.evaluate(nameless) == []


def test_suggestion_is_sent(tab: Any) -> None:
    tab.will_answer(["85"])
    tab.page.get_by_role("button", name="What is 47 + 38?").click()
    tab.wait("done")
    assert tab.mock.requests[0]["messages"] == [{"role": "user", "content": "What is 47 + 38?"}]
    assert tab.page.locator("#suggestions").is_hidden()


@pytest.mark.parametrize("tab", [{"color_scheme": "dark"}], indirect=True)
def test_colours_follow_the_system_until_chosen(tab: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    dark = tab.page.evaluate(background)
    tab.page.get_by_role("button", name="Switch to light colours").click()
    assert tab.page.evaluate(background) == "rgb(255, 255, 255)" != dark
    tab.page.reload()
    assert tab.page.evaluate(background) == "rgb(255, 255, 255)"
    tab.page.get_by_role("button", name="Switch to dark colours").click()
    assert tab.page.evaluate(background) == dark


@pytest.mark.parametrize("tab", [{"viewport": {"width": 360, "height": 700}}], indirect=True)
def test_a_small_screen_holds_wide_content(tab: Any) -> None:
    page = tab.page
    wide = (
        "| "
        + " | ".join(f"column {i}" for i in range(12))
        + " |\n|"
        + "---|" * 12
        + "\n\n```\n"
        + "x" * 300
        + "\n```\n"
    )
    tab.ask("w" * 200, [wide])
    tab.wait("done")
    assert page.evaluate("document.querySelector('#thread').scrollWidth <= innerWidth")
    send = page.get_by_role("button", name="Send message").bounding_box()
    assert send["x"] + send["width"] <= 360 and send["y"] + send["height"] <= 700
    expect(page.get_by_role("navigation", name="Your chats")).not_to_be_visible()
    page.get_by_role("button", name="Show sidebar").click()
    page.locator(".chat-open").click()
    expect(page.get_by_role("navigation", name="Your chats")).not_to_be_visible()


def test_end_is_followed_until_the_reader_scrolls_up(tab: Any) -> None:
    page = tab.page
    lines, turned = [f"line {i}\n\n" for i in range(200)], threading.Event()
    tab.ask("count", [*lines[:30], turned, *lines[30:]], pause=0.03)
    expect(tab.answer().locator(".answer")).to_contain_text("line 29")
    tab.until(lambda: page.evaluate(LEFT) < 60)
    page.locator("#thread").hover()
    at_end = settled(page, TOP)
    page.mouse.wheel(0, -50)
    tab.until(lambda: page.evaluate(TOP) < at_end)
    turned.set()
    tab.until(lambda: page.evaluate(LEFT) > 200)  # lines arrive, the view stays in place
    place = settled(page, TOP)
    expect(tab.answer().locator(".answer")).to_contain_text("line 150", timeout=20_000)
    assert page.evaluate(TOP) == place
    page.get_by_role("button", name="Scroll to the latest message").click()
    tab.wait("done")
    tab.until(lambda: page.evaluate(LEFT) < 2)


def test_wheel_turned_up_holds_the_view_before_the_page_s_own_scroll_is_reported(tab: Any) -> None:
    tab.ask("count", ["line\n\n" * 60])
    tab.wait("done")
    tab.until(lambda: tab.page.evaluate(LEFT) < 2)
    settled(tab.page, TOP)
    grow = """async () => {
        const [thread, line] = [document.querySelector("#thread"), document.createElement("div")];
        line.style.height = "400px";
        document.querySelector("#messages").append(line);
        thread.scrollTop = thread.scrollHeight;
        thread.dispatchEvent(new WheelEvent("wheel", { deltaY: -50 }));
        thread.scrollTop -= 50;
        // Each frame reports what was scrolled and what has grown: by then the page has moved the view if it does.
        for (let i = 0; i < 5; i++) await new Promise(requestAnimationFrame);
    }"""
    tab.page.evaluate(grow)
    assert 45 < tab.page.evaluate(LEFT) < 55


def test_way_down_to_the_end_is_followed_though_the_end_moves_on(tab: Any) -> None:
    page = tab.page
    tab.ask("count", ["line\n\n" * 200])
    tab.wait("done")
    page.locator("#thread").hover()
    page.mouse.wheel(0, -3000)
    expect(page.get_by_role("button", name="Scroll to the latest message")).to_be_visible()
    settled(page, TOP)
    grow = """() => {
        document.querySelector("#jump").click();
        document.querySelector("#thread").addEventListener("scroll", () => {
            const line = document.createElement("div");
            line.id = "late";
            line.style.height = "400px";
            document.querySelector("#messages").append(line);
        }, { once: true });
    }"""
    page.evaluate(grow)
    tab.until(lambda: page.locator("#late").count() == 1)
    tab.until(lambda: page.evaluate(LEFT) < 2)
