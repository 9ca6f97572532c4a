"""The chat page: pathological answers are shown all the same, and long answers do not freeze it."""

from typing import Any

import pytest
from playwright.sync_api import expect

SHOW = """async (text) => {
    const { MarkdownView } = await import("/web/js/markdown.js");
    const element = document.createElement("div");
    document.querySelector("#main").classList.remove("empty");
    document.querySelector("#messages").append(element);
    const start = performance.now();
    new MarkdownView(element).show(text);
    element.scrollHeight;
    const ms = performance.now() - start;
    await new Promise((resolve) => setTimeout(resolve, 50)); // formulas come later
    element.scrollHeight;
    const result = [element.textContent, ms, element.querySelectorAll(".plain-note").length];
    element.remove();
    return result;
}"""
DEEP = {
    "quotes": "> " * 3000 + "END",
    "tight quotes": ">" * 3000 + "END",
    "lists": "- " * 3000 + "END",
    "numbers": "1. " * 3000 + "END",
    "indented lists": "\n".join("  " * depth + "- x" for depth in range(400)) + "END",
    "one megabyte line": "word " * 200_000 + "END",
    "one megabyte word": "x" * 1_000_000 + "END",
    "spaces": " " * 30_000 + "END",
    "strong": "**a " * 6000 + "b**" * 6000 + "END",
}
HARD = {
    "brackets": "[" * 9000 + "END",
    "bracket pairs": "[" * 4000 + "x" + "]" * 4000 + "END",
    "links": "[a](" * 2000 + "END",
    "stars": "*a **b " * 1400 + "END",
    "strikes": "~~a ~b " * 600 + "b~ b~~ " * 600 + "END",
    "dots": "a.b-c_" * 1600 + "@END",
    "html": "<div>" * 3000 + "END",
    "html lines": "<div>\n" * 3000 + "END",
    "comments": "a <!-- " * 1400 + "END",
    "ticks": "`a ``b " * 1400 + "END",
    "braces": "$" + "{" * 3000 + "x" + "}" * 3000 + "$END",
    "fractions": "$" + "\\frac{" * 600 + "x" + "}{1}" * 600 + "$END",
    "left": "$" + "\\left(" * 300 + "x" + "\\right)" * 300 + "$END",
    "formulas": "$$a " * 2400 + "END",
    "cells": "|a|b|c|d|\n|-|-|-|-|\n" + "|1|2|3|4|\n" * 5000 + "|END|",
    "columns": "|" + "a|" * 1000 + "\n|" + "-|" * 1000 + "\n|" + "1|" * 999 + "END|",
    "definitions": "".join(f"[a{i}]: b\n" for i in range(5000)) + "\nEND",
    "code": "```js\n" + "`${" * 6000 + "END\n```",
    "json": "```json\n" + "[" * 6000 + "END\n```",
}


def test_unformattable_blocks_are_plain_text_with_a_note(tab: Any) -> None:
    for name, source in DEEP.items():
        text, ms, notes = tab.page.evaluate(SHOW, f"before\n\n{source}\n\nafter")
        assert text.startswith("before") and text.rstrip().endswith("after") and "END" in text, name
        assert notes == 1 and len(text) >= len(source), name
        assert ms < 10_000, name  # at most a second on an idle machine


def test_hostile_shapes_are_shown_in_bounded_time(tab: Any) -> None:
    for name, source in HARD.items():
        text, ms, _ = tab.page.evaluate(SHOW, f"before\n\n{source}\n\nafter")
        assert text.startswith("before") and text.rstrip().endswith("after") and "END" in text, name
        assert ms < 10_000, name


def test_an_answer_of_nested_quotes_is_not_lost(tab: Any) -> None:
    quotes = ["> " * 500] * 6
    tab.ask("quote", ["The **start**.\n\n", *quotes, "the end"], thinking=["> " * 3000])
    answer = tab.wait("done")
    expect(answer.locator(".answer strong")).to_have_text("start")
    assert answer.locator(".plain").last.inner_text() == "> " * 3000 + "the end"
    expect(answer.locator(".answer .plain-note")).to_contain_text("nested too deeply")
    tab.page.reload()
    assert tab.wait("done").locator(".answer .plain").inner_text().endswith("the end")


def test_an_error_of_the_renderer_costs_the_format_of_one_block_only(tab: Any) -> None:
    page = tab.page
    broken = """async () => {
        const { Lexer } = await import("/web/vendor/marked.js");
        const lex = Lexer.prototype.lex;
        Lexer.prototype.lex = function (source) {
            if (source.includes("bad")) throw new RangeError("Maximum call stack size exceeded");
            return lex.call(this, source);
        };
    }"""
    page.evaluate(broken)
    text, _, notes = page.evaluate(SHOW, "a **good** one\n\na **bad** one\n\n- an *end*")
    assert "a good one" in text and "a **bad** one" in text and "an end" in text and notes == 1


SPLIT = """async (text) => {
    const { BlockSplitter } = await import("/web/js/blocks.js");
    const whole = new BlockSplitter().push(text).blocks;
    const splitter = new BlockSplitter();
    let grown = [];
    for (let end = 1; end <= text.length; end += 7) {
        const { kept, blocks } = splitter.push(text.slice(0, end));
        grown = [...grown.slice(0, kept), ...blocks];
    }
    const { kept, blocks } = splitter.push(text);
    grown = [...grown.slice(0, kept), ...blocks];
    const plain = (list) => list.map(({ kind, source, info }) => [kind, source, info ?? ""]);
    return [plain(whole), plain(grown)];
}"""


def test_blocks_are_the_same_however_the_text_arrives(tab: Any) -> None:
    text = (
        "# Title\ntext\n\n- a\n\n- b\n  ```py\n  x\n\n  y\n  ```\n- c\n\npara\n```js\ncode\n\nmore\n```\nafter\n\n"
        "$$\na\n\nb\n$$\n\n    indented\n\n    code\n\n~~~\nopen fence\n\n"
    )
    whole, grown = tab.page.evaluate(SPLIT, text)
    assert whole == grown
    assert [kind for kind, _, _ in whole] == [*["markdown"] * 3, "code", *["markdown"] * 3, "code"]
    assert whole[3] == ["code", "code\n\nmore", "js"] and whole[-1][1] == "open fence\n"
    assert whole[1][1].startswith("- a") and whole[1][1].endswith("- c")
    for unit, head in (("- item of a list\n", ""), ("| 1 | 2 |\n", "| a | b |\n|---|---|\n"), ("a line\n", "")):
        whole, grown = tab.page.evaluate(SPLIT, head + unit * 3000)
        assert whole == grown and len(whole) >= 3
        assert all(source.startswith(head) and len(source) < 9000 for _, source, _ in whole)


def test_links_defined_at_the_end_work(tab: Any) -> None:
    tab.ask("link", ["See [the docs][1].\n\n", "[1]: https://example.org/docs\n"])
    tab.wait("done")
    expect(tab.answer().get_by_role("link", name="the docs")).to_have_attribute("href", "https://example.org/docs")


@pytest.mark.parametrize(
    "unit", ["- an item with **bold** words\n", "word " * 30 + "\n\n", "> quoted words\n", "line\n"]
)
def test_drawing_a_long_answer_costs_no_more_at_its_end(tab: Any, unit: str) -> None:
    stream = """async (unit) => {
        const { MarkdownView } = await import("/web/js/markdown.js");
        const view = new MarkdownView(document.createElement("div"));
        const whole = unit.repeat(Math.ceil(200_000 / unit.length)); // 50,000 tokens
        const costs = [];
        for (let end = 1000; end <= 200_000; end += 1000) {
            const start = performance.now();
            view.show(whole.slice(0, end), true);
            costs.push(performance.now() - start);
        }
        const middle = (part) => part.sort((a, b) => a - b)[part.length >> 1];
        return [middle(costs.slice(20, 60)), middle(costs.slice(-40))];
    }"""
    early, late = tab.page.evaluate(stream, unit)
    assert late < 4 * early + 10  # redrawing all would take five times as long, and 300 ms


def test_footnotes(tab: Any) -> None:
    text = (
        "Water[^1] boils[^note2], see `[^1]` and [^abc].\n\n[^1]: It is **wet**.\n[^note2]: At 100 °C,\nby the sea."
        "\n\n[^3]: <img src=x onerror=window.pwned=1>"
    )
    tab.ask("hi", [text])
    answer = tab.wait("done").locator(".answer")
    assert answer.locator(".footnote-mark").all_inner_texts() == ["1", "note2"]
    assert answer.locator(".footnote-text").all_inner_texts() == [
        "1 It is wet.",
        "note2 At 100 °C,\nby the sea.",
        "3 <img src=x onerror=window.pwned=1>",
    ]
    assert answer.locator(".footnote-text strong").inner_text() == "wet"
    expect(answer.locator("p").first).to_have_text("Water1 boilsnote2, see [^1] and [^abc].")
