"""The chat page: hostile model output, Content-Security-Policy, API keys, and the parser of event streams."""

import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from playwright.sync_api import Error, expect

from dsv4.server.web import STATIC

MODEL = "dsv4-nano"


def fetch(url: str) -> Any:
    return urllib.request.urlopen(url, timeout=60)


def test_routes_headers_and_local_files_only(mock: Any) -> None:
    with fetch(mock.url) as page, fetch(mock.url + "web/js/app.js") as script:
        policy = page.headers["content-security-policy"]
        assert page.headers["content-type"].startswith("text/html")
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.headers["content-security-policy"] == policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        fetch(mock.url + "web/%2e%2e/__init__.py")
    caught.value.close()
    for path in STATIC.rglob("*"):
        if path.suffix in {".html", ".css", ".js"} and "vendor" not in path.parts:
            urls = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}", path.read_text())
            assert set(urls) <= {"http://www.w3.org"}, path


HOSTILE = (
    "<img src=x onerror='window.pwned=1'> and <script>window.pwned=2</script>\n\n"
    "<svg onload='window.pwned=3'></svg>\n\n"
    "<div><iframe srcdoc='<script>parent.pwned=4</script>'></iframe></div>\n\n"
    "[link](javascript:window.pwned=5) ![pixel](http://example.com/p.png)\n\n"
    '```"><img src=x onerror=window.pwned=6>\n</code><img src=x onerror=window.pwned=7>\n```\n\n'
    "$\\href{javascript:window.pwned=8}{x}$ and $<img src=x onerror=window.pwned=9>$\n"
)


@pytest.mark.parametrize("tab", [{"bypass_csp": True}], indirect=True)  # tests the sanitizer alone
def test_hostile_output_is_shown_not_run(tab: Any) -> None:
    tab.ask(HOSTILE, [HOSTILE], thinking=[HOSTILE])
    answer = tab.wait("done")
    answer.locator("summary").click()
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("window.pwned") is None
    messages = "#messages, #chats"
    assert tab.page.locator(messages).locator("img, script, iframe, svg:not(.icon), [onerror], [onload]").count() == 0
    assert [link.get_attribute("href") for link in answer.locator("a").all()].count("http://example.com/p.png") == 2
    assert "javascript:" not in tab.page.evaluate("[...document.links].map(link => link.href).join()")
    assert "<img src=x onerror='window.pwned=1'>" in tab.text()  # the model's text is kept


def test_content_policy_stops_what_a_sanitizer_would_miss(tab: Any) -> None:
    with pytest.raises(Error, match="TrustedHTML"):
        tab.page.evaluate("document.body.innerHTML = '<img src=x onerror=window.pwned=1>'")
    tab.errors.clear()


def test_api_key_is_asked_for_sent_and_kept_for_the_tab_only(tab: Any) -> None:
    page = tab.page
    expect(page.locator("#model")).to_have_text(MODEL)  # the question is refused, not the list of models
    tab.mock.key = "sk-right"
    tab.ask("hi", ["welcome"])
    field = page.get_by_role("alert").get_by_label("API key")
    field.fill("sk-wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("did not accept this API key")
    field.fill("sk-right")
    page.get_by_role("button", name="Continue").click()
    assert tab.wait("done").locator(".answer").inner_text() == "welcome"  # the refused question is asked again
    assert tab.mock.refusals == 1, "a key that the list of models refuses is not tried on the question"
    assert page.locator("#banner").is_hidden() and page.locator(".assistant").count() == 1
    page.reload()
    expect(page.locator("#model")).to_have_text(MODEL)
    assert "sk-right" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_that_cannot_be_sent_is_a_wrong_one(tab: Any) -> None:
    tab.mock.key = "sk-right"
    tab.page.reload()
    field = tab.page.get_by_role("alert").get_by_label("API key")
    field.fill("sk-r\u0456ght")
    field.press("Enter")
    expect(tab.page.locator("#banner")).to_contain_text("did not accept this API key")
    tab.ask("hi")
    failure = tab.wait("error").locator(".failure")
    expect(failure).to_contain_text("did not accept this API key")
    expect(failure).to_contain_text("a character that is not ASCII")


def test_a_right_key_removes_every_refusal(tab: Any) -> None:
    page = tab.page
    tab.mock.key = "sk-right"
    for question in ("hi", "again"):
        tab.ask(question)
        expect(page.locator(".failure:visible").last).to_contain_text("The server asks for an API key")
    tab.will_answer(["welcome"])
    page.get_by_role("alert").get_by_label("API key").fill("sk-right")
    page.keyboard.press("Enter")
    expect(tab.answer()).to_contain_text("welcome")
    expect(page.locator(".failure:visible")).to_have_count(0)


def test_asking_for_the_key_does_not_take_the_focus_from_a_message_being_written(tab: Any) -> None:
    page, held = tab.page, []
    tab.mock.key = "sk-right"
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.fill("#prompt", "half a")
    held.pop().continue_()
    expect(page.get_by_role("alert").get_by_label("API key")).to_be_visible()
    page.keyboard.type(" question")
    expect(page.locator("#prompt")).to_have_value("half a question")


def test_event_stream_parser_and_open_marks(tab: Any) -> None:
    wire = ': hi\r\n\r\ndata: {"a": "\u00e9\u4e2d"}\n\ndata:x\ndata: y\r\n\nevent: z\n\ndata: [DONE]\n\ndata: cut'
    parse = """async ([bytes, size]) => {
        const { eventData } = await import("/web/js/api.js");
        const data = new Uint8Array(bytes);
        const start = (controller) => {
            for (let at = 0; at < data.length; at += size) controller.enqueue(data.slice(at, at + size));
            controller.close();
        };
        const found = [];
        for await (const event of eventData(new ReadableStream({ start }))) found.push(event);
        return found;
    }"""
    for size in (1, 2, 3, 7, 1000):
        found = tab.page.evaluate(parse, [list(wire.encode()), size])
        assert found == ['{"a": "\u00e9\u4e2d"}', "x\ny", "[DONE]"]
    close = "async (text) => (await import('/web/js/markdown.js')).closeMarks(text)"
    cases = {
        "a **b": "a **b**",
        "a **": "a ",
        "a **b**": "a **b**",
        "use `x": "use `x`",
        "`**` and": "`**` and",
        "```\n**x": "```\n**x",
        "done **x\n\nnext": "done **x\n\nnext",
    }
    assert {text: tab.page.evaluate(close, text) for text in cases} == cases
