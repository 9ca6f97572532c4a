"""Takes the docs' pictures of the chat page: python scripts/screenshots.py [FOLDER, docs by default].

The embedded model answers; the chat with a diagram is an imported example. Needs the test extra and Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from dsv4.engine import LLM
from dsv4.engine.draft_length import FixedLength
from dsv4.model_folder import resolve_model

ROOT = Path(__file__).parent.parent
DESKTOP, PHONE = {"width": 1200, "height": 760}, {"width": 390, "height": 780}
# The embedded model answers these right, after each other too.
CAPITAL, EQUATION = "What is the capital of France?", "Solve for x: 3*x + 4 = 19"
PERSON = "Extract name and city as JSON: Anna is 34 years old and lives in Rome."
ANSWER = """It is **-3 °C** in Oslo. A request takes this way:

```mermaid
graph LR
  Prompt --> Cached{In the cache?}
  Cached -->|yes| Decode
  Cached -->|no| Prefill --> Decode
  Decode --> Answer
```

Attention reads a window of 128 tokens and compressed entries:

| layer | entries of a million tokens |
|---|---|
| CSA | $10^6 / 4$, of which it chooses the best |
| HCA | $10^6 / 128$, all of them |
"""
CALL = {"id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}', "result": '{"degrees": -3}'}


def example() -> dict[str, Any]:
    """An exported chat: a tool call, and an answer with a diagram and formulas."""
    thoughts = "The user asks for the weather: I call the tool."
    question = {"id": "a", "parent": None, "role": "user", "content": "How cold is it in Oslo, and how do you work?"}
    call = {"id": "b", "parent": "a", "role": "assistant", "content": "", "status": "done", "toolCalls": [CALL]}
    call |= {"reasoning": thoughts, "thinkMs": 1400, "tokens": 41}
    answer = {"id": "c", "parent": "b", "role": "assistant", "content": ANSWER, "status": "done", "tokens": 131}
    nodes = {node["id"]: node for node in (question, call, answer)}
    chat = {"title": "The weather in Oslo", "nodes": nodes, "picked": {"": "a", "a": "b", "b": "c"}}
    return {"format": "dsv4.chat", "version": 1, "conversation": chat}


@contextmanager
def opened(browser: Browser, url: str, scheme: Any, size: Any) -> Iterator[Page]:
    context = browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce")
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("dsv4")
    yield page
    context.close()


def ask(page: Page, text: str) -> None:
    answers = page.locator(".assistant")
    count = answers.count()
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    expect(answers).to_have_count(count + 1)
    expect(answers.last).to_have_attribute("data-status", re.compile("done|length"), timeout=60_000)


def import_example(page: Page) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "example.json"
        file.write_text(json.dumps(example()))
        page.set_input_files("#import-file", file)
        expect(page.locator("figure.diagram img")).to_be_visible(timeout=30_000)
    page.wait_for_timeout(500)


def take(browser: Browser, url: str, folder: Path) -> None:
    with opened(browser, url, "light", DESKTOP) as page:
        ask(page, CAPITAL)
        page.locator("#new-chat").click()
        ask(page, EQUATION)
        page.locator(".thinking summary").click()
        page.locator(".stats").click()
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "chat.png")
    for scheme, size, name in (("dark", DESKTOP, "chat-dark.png"), ("dark", PHONE, "phone-dark.png")):
        with opened(browser, url, scheme, size) as page:
            import_example(page)
            page.screenshot(path=folder / name)
    with opened(browser, url, "light", PHONE) as page:
        ask(page, CAPITAL)
        ask(page, PERSON)
        page.locator(".stats").last.click()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "phone.png")
    with opened(browser, url, "light", {"width": 1120, "height": 720}) as page:
        page.get_by_role("button", name="Hide sidebar").click()
        for question in (CAPITAL, PERSON, CAPITAL, PERSON, EQUATION):  # which fill the window
            ask(page, question)
        page.get_by_role("button", name="Inspect answer").last.click()
        expect(page.locator(".layer-row")).to_have_count(6, timeout=30_000)
        page.locator(".layer-row").nth(2).click()
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "inspector.png")


def main(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.server.conftest import serving

    llm = LLM(resolve_model(None), max_num_seqs=2, max_model_len=4096, speculate=2)
    assert llm.core.speculator is not None
    llm.core.speculator.lengths = FixedLength(2)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with serving(llm) as served, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take(browser, served.url + "/", folder)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
