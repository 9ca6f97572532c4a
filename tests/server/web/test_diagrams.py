"""The chat page: Mermaid diagrams, drawn in a sandboxed frame and shown as images."""

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

CHART = "```mermaid\ngraph TD\n  A[Prompt] --> B{Cached?}\n  B -->|yes| C[Answer]\n  B -->|no| D[Read it] --> C\n```\n"
BROKEN = "```mermaid\ngraph TD\n  A --> --> ]]\n```\n"
SEQUENCE = "- as a list:\n\n  ```mermaid\n  sequenceDiagram\n    accTitle: Asking\n    You->>Model: Hi\n  ```\n"


def width(image: Any) -> int:
    return image.evaluate("e => e.complete ? e.naturalWidth : 0")


def test_a_diagram_is_drawn_as_soon_as_its_text_is_whole(tab: Any) -> None:
    pieces = ["Look:\n\n", CHART[:40], CHART[40:-5], CHART[-5:], "And then ", "some more."]
    tab.ask("draw", pieces, pause=0.7)
    block = tab.page.locator("figure.diagram")
    image = block.locator("img")
    expect(block.locator("pre")).to_be_visible()
    expect(image).to_be_visible(timeout=30_000)
    tab.until(lambda: width(image) > 100)
    assert image.get_attribute("alt") == "Diagram: graph TD"
    tab.wait("done")
    expect(block.locator("pre")).to_be_hidden()
    block.get_by_role("button", name="Show source").click()
    expect(block.locator("pre")).to_contain_text("B{Cached?}")
    block.get_by_role("button", name="Show diagram").click()
    expect(image).to_be_visible()
    block.get_by_role("button", name="Copy code").click()
    copied = "navigator.clipboard.readText()"
    tab.until(lambda: tab.page.evaluate(copied) == CHART.removeprefix("```mermaid\n").removesuffix("\n```\n"))


def test_nothing_is_loaded_without_a_diagram(tab: Any) -> None:
    loaded: list[str] = []
    tab.page.on("request", lambda request: loaded.append(request.url))
    tab.page.reload()
    tab.ask("no", ["```python\nprint(1)\n```"])
    tab.wait("done")
    assert not any("mermaid" in url for url in loaded)


def test_a_broken_diagram_shows_its_source_and_why(tab: Any) -> None:
    tab.ask("draw", [f"{BROKEN}\n{SEQUENCE}"])
    tab.wait("done")
    broken, other = tab.page.locator("figure.diagram").nth(0), tab.page.locator("figure.diagram").nth(1)
    expect(broken.locator(".plain-note")).to_contain_text(
        "This diagram cannot be drawn: Parse error on line", timeout=30_000
    )
    expect(broken.locator("pre")).to_contain_text("A --> --> ]]")
    expect(broken.locator("img")).to_be_hidden()
    expect(other.get_by_role("img", name="Asking")).to_be_visible(timeout=30_000)
    assert tab.page.locator("body > :not(#main) svg:not(.icon)").count() == 0, "no error drawing is left behind"


def test_a_diagram_follows_the_colours(tab: Any) -> None:
    tab.ask("draw", [CHART])
    image = tab.wait("done").locator("figure.diagram img")
    expect(image).to_be_visible(timeout=30_000)
    light = image.get_attribute("src")
    tab.page.get_by_role("button", name="Switch to dark colours").click()
    tab.until(lambda: image.get_attribute("src") != light and width(image) > 100)


HOSTILE = [
    'graph TD\n  A["<img src=x onerror=parent.pwned=1>"] --> B["<script>parent.pwned=2</script>"]',
    'graph TD\n  A --> B\n  click A "javascript:parent.pwned=3"\n  click B call alert("x")',
    '%%{init: {"securityLevel": "loose", "htmlLabels": true, "flowchart": {"htmlLabels": true}}}%%\n'
    'graph TD\n  A["<img src=http://example.com/p.png onerror=parent.pwned=4>"]',
    "graph TD\n  A --> B\n  style A fill:url(http://example.com/p.png)",
    '%%{init: {"themeCSS": "@import url(http://example.com/p.css); svg{background:url(http://example.com/p.png)}"}}%%\n'
    "graph TD\n  A --> B",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_diagram_runs_and_loads_nothing(tab: Any, source: str) -> None:
    answered: list[str] = []
    tab.page.on("response", lambda response: answered.append(response.url))
    tab.ask("draw", [f"```mermaid\n{source}\n```"])
    block = tab.wait("done").locator("figure.diagram")
    expect(block.locator("img:visible, .plain-note:visible")).to_have_count(1, timeout=30_000)
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.pwned") is None
    assert not any("example.com" in url for url in answered)
    tab.hosts.discard("example.com")  # asked for, and blocked by the frame's policy
    tab.errors.clear()


def test_the_frame_has_an_origin_of_its_own(tab: Any) -> None:
    tab.ask("draw", [CHART])
    expect(tab.wait("done").locator("figure.diagram img")).to_be_visible(timeout=30_000)
    frame = next(frame for frame in tab.page.frames if frame.url.endswith("diagram.html"))
    assert frame.evaluate("origin") == "null"
    reaches = "(async () => { try { return parent.document.title } catch (e) { return e.name } })()"
    assert frame.evaluate(reaches) == "SecurityError"
    assert frame.evaluate("fetch('/v1/models').then(() => 'read', () => 'refused')") == "refused"
    tab.errors.clear()


def test_a_diagram_that_takes_too_long_is_given_up(tab: Any) -> None:
    page = tab.page
    page.route("**/diagram.html", lambda route: route.fulfill(body="<p>silent</p>", content_type="text/html"))
    page.clock.install()
    tab.ask("draw", [CHART])
    expect(page.locator(".diagram-frame")).to_have_count(1)
    page.clock.run_for(21_000)
    expect(page.locator("figure.diagram .plain-note")).to_contain_text("it takes too long")
    expect(page.locator(".diagram-frame")).to_have_count(0)
    expect(page.locator("figure.diagram pre")).to_be_visible()


def test_the_real_server_serves_the_frame(open_tab: Callable[[str], Any], serve: Any, model: Any) -> None:
    model.reply = "</think>" + CHART
    with serve(model) as served:
        tab = open_tab(served.url + "/")
        tab.ask("draw")
        expect(tab.wait("done").locator("figure.diagram img")).to_be_visible(timeout=30_000)
