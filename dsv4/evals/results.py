"""Scores by task and mode: record, pooling, tables, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from dsv4.evals.intervals import wilson

MODES = ("thinking", "non-thinking")
ALL = "all tasks"  # name of a pooled score


@dataclass(frozen=True)
class Score:
    """Counts of one task in one mode: examples, correct and unfinished answers, generated tokens."""

    task: str
    group: str
    mode: str
    examples: int
    correct: int
    unfinished: int
    tokens: int

    @property
    def rate(self) -> float:
        return self.correct / self.examples if self.examples else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of the rate."""
        return wilson(self.correct, self.examples)


def pooled(scores: Sequence[Score], mode: str) -> Score:
    """Score over all examples of a mode, so that a task weighs by its number of examples."""
    chosen = [score for score in scores if score.mode == mode]
    return Score(
        task=ALL,
        group="",
        mode=mode,
        examples=sum(score.examples for score in chosen),
        correct=sum(score.correct for score in chosen),
        unfinished=sum(score.unfinished for score in chosen),
        tokens=sum(score.tokens for score in chosen),
    )


def to_json(scores: Sequence[Score], settings: dict[str, Any]) -> dict[str, Any]:
    """Scores, pooled scores and settings as plain values."""

    def entry(score: Score) -> dict[str, Any]:
        low, high = score.interval
        return asdict(score) | {"rate": score.rate, "low95": low, "high95": high}

    modes = [mode for mode in MODES if any(score.mode == mode for score in scores)]
    return {
        "settings": settings,
        "tasks": [entry(score) for score in scores],
        "overall": {mode: entry(pooled(scores, mode)) for mode in modes},
    }


def cell(score: Score | None) -> str:
    """Rate and interval as `87 % (79-92)`; a dash without examples."""
    if score is None or not score.examples:
        return "-"
    low, high = score.interval
    return f"{100 * score.rate:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def rows(scores: Sequence[Score]) -> list[tuple[str, str, str, str]]:
    """Rows of text (task, thinking, non-thinking, mean tokens in thinking mode) per task, then for all tasks."""
    by_key = {(score.task, score.mode): score for score in scores}
    for mode in MODES:
        by_key[ALL, mode] = pooled(scores, mode)
    lines = []
    for task in [*dict.fromkeys(score.task for score in scores), ALL]:
        thinking, plain = (by_key.get((task, mode)) for mode in MODES)
        mean = f"{thinking.tokens / thinking.examples:.0f}" if thinking and thinking.examples else "-"
        lines.append((task, cell(thinking), cell(plain), mean))
    return lines


HEADINGS = ("task", "thinking (95 %)", "non-thinking (95 %)", "tokens, thinking")


def to_table(scores: Sequence[Score]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(*HEADINGS)
    lines = rows(scores)
    for place, line in enumerate(lines):
        table.add_row(*line, end_section=place == len(lines) - 2)
    return table


def to_markdown(scores: Sequence[Score]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(scores)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
