"""Retrieval of one fact from a long text, by length and depth: haystacks of held-out packages, greedy answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from deepseek_recipe import Conversation, UserMessage

from dsv4.data.nano.build import load_entries, needle_words
from dsv4.data.nano.entries import texts
from dsv4.data.nano.needles import Haystack, fill, haystack, split_lines
from dsv4.data.stable_hash import stable_hash
from dsv4.engine import LLM, SamplingParams
from dsv4.evals.ledger import Ledger

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DEPTHS = tuple(depth / 10 for depth in range(11))
REQUIRED = 32768  # tokens up to which retrieval is asked of the model
MAX_TOKENS = 24


@dataclass(frozen=True)
class Cell:
    """Tests of one length and depth."""

    length: int
    depth: float
    tests: int
    found: int


def examples_of(length: int, examples: int) -> int:
    """Tests per depth: fewer of the longest, which take minutes each."""
    return examples if length <= REQUIRED else max(1, examples // 4)


def needle_curve(
    llm: LLM,
    corpus: Path,
    data: Path,
    lengths: Sequence[int],
    examples: int,
    ledger: Ledger,
    say: Callable[[str], object],
) -> list[Cell]:
    """Tests at each length and depth. ValueError if the model has no tokenizer or the corpus no held-out packages."""
    words = needle_words(load_entries(data))
    cells: list[Cell] = []
    for length in lengths:
        count = examples_of(length, examples)
        for depth in DEPTHS:
            key = f"needle {length} {depth} {count}"
            found = ledger.get(key)
            if found is None:
                tests = [make_test(llm, corpus, words, length, depth, number) for number in range(count)]
                found = ledger.put(key, sum(answer_tests(llm, tests)))
            cells.append(Cell(length, depth, count, found))
        row = cells[-len(DEPTHS) :]
        say(f"needles, {length} tokens: {' '.join(f'{100 * cell.found / cell.tests:.0f}' for cell in row)} %")
    return cells


def make_test(llm: LLM, corpus: Path, words: list[str], length: int, depth: float, number: int) -> Haystack:
    """A test, a function of its length, depth and number."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; needles are asked in text")
    random = Random(stable_hash("needle test", length, depth, number))
    lines = fill(_held_out_lines(corpus, random), length - 128, lambda line: len(tokenizer.encode(line)))
    return haystack(random, lines, words, depth)


def answer_tests(llm: LLM, tests: Sequence[Haystack]) -> list[bool]:
    """True for each test whose word is in the greedy answer, without thinking."""
    assert llm.prompts is not None
    prompts = [llm.prompts.encode(Conversation([UserMessage(test.prompt)], thinking_mode=False)) for test in tests]
    outputs = [llm.generate([prompt], SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))[0] for prompt in prompts]
    return [
        re.search(rf"\b{test.answer}\b", output.text) is not None for test, output in zip(tests, outputs, strict=True)
    ]


def _held_out_lines(corpus: Path, random: Random) -> Iterator[str]:
    """Lines of the held-out packages from a random document on, over and over."""
    paths = sorted((corpus / "validation").glob("*/*.jsonl"))
    if not paths:
        raise ValueError(f"{corpus}/validation holds no packages to hide facts in")
    path = random.choice(paths)
    documents = list(texts(path))
    start = random.randrange(len(documents))
    while True:
        yield from split_lines(iter(documents[start:] + documents[:start]))


def to_lines(cells: Sequence[Cell]) -> Iterator[str]:
    """Rows of a Markdown table: a line per length, a column per depth, and the least of each length."""
    yield "| tokens | " + " | ".join(f"{depth:.0%}" for depth in DEPTHS) + " | least |"
    yield "| --- " * (len(DEPTHS) + 2) + "|"
    for length in dict.fromkeys(cell.length for cell in cells):
        rates = [cell.found / cell.tests for cell in cells if cell.length == length]
        yield f"| {length:,} | " + " | ".join(f"{100 * rate:.0f}" for rate in [*rates, min(rates)]) + " |"
