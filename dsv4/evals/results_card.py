"""Markdown of a post-training run's results, and the README.md of a model folder that has only those."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4.analysis.parameters import count_parameters
from dsv4.config import ModelConfig
from dsv4.evals.post_training_results import Count, Results

CARD = """\
---
license: mit
library_name: dsv4
---
# dsv4: one student of four specialists

A language model of DeepSeek V4's architecture: {total:.1f} million parameters, {active:.1f} million active per token,
{vocab:,} tokens, weights in the official layout (FP4 experts, FP8 projections). `dsv4 train v4` made it: a base,
fine-tuned, then specialists by SFT and GRPO, then this student by on-policy distillation. In this folder, `dsv4 chat .`
talks to it, and `dsv4 serve .` serves it.

## Results

{results}
## Recipe

```
{command}
```

Made with {made_by}. `v4.toml` has all keys of the run; BASE, SFT and `corpus` stand for
folders that were given.
"""


def describe_results(results: Results) -> str:
    """Markdown: aims with their figures, the scores of all models, what GRPO added, the levels of reasoning."""
    lines = [f"- {'reached' if good else '**missed**'}: {words}" for good, words in results.findings()]
    lines += ["", f"| model | {' | '.join(results.domains)} |", "| --- " * (1 + len(results.domains)) + "|"]
    lines += [
        f"| {name} | {' | '.join(_cell(row[domain]) for domain in results.domains)} |"
        for name, row in results.scores.rows()
    ]
    if results.fine_tuned:
        lines += ["", "| specialist | fine-tuned | after GRPO | difference, points |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {domain} | {_cell(before)} | {_cell(after)} | {100 * low:+.1f} to {100 * high:+.1f} |"
            for domain, before, after, (low, high) in results.of_grpo()
        ]
    if results.general:
        modes = list(results.general["start"])
        lines += ["", f"| general tasks | {' | '.join(modes)} |", "| --- " * (1 + len(modes)) + "|"]
        lines += [
            f"| {name} | {' | '.join(_cell(row[mode]) for mode in modes)} |" for name, row in results.general.items()
        ]
    if results.efforts:
        lines += ["", "Levels of reasoning, in the windows of tokens that their reinforcement learning had, and free:"]
        lines += ["", "| level of reasoning | right | mean tokens | free: right | mean tokens |", f"|{' --- |' * 5}"]
        lines += [f"| {name} | {' | '.join(one.cells())} |" for name, one in results.efforts.items()]
    return (
        "Held-out questions, answered greedily; 95 % intervals in brackets. `results.html` has the plots and the "
        "command of every stage.\n\n" + "\n".join(lines) + "\n"
    )


def write_card(config: ModelConfig, results: Results, command: str, made_by: Sequence[str]) -> str:
    """README.md of a student: what it is, its results, the command that made it; by what seed, code and machine."""
    counts = count_parameters(config)
    return CARD.format(
        total=counts.total_with_mtp / 1e6,
        active=counts.active / 1e6,
        vocab=config.vocab_size,
        results=describe_results(results),
        command=command,
        made_by="; ".join(made_by),
    )


def _cell(count: Count) -> str:
    low, high = count.interval
    return f"{100 * count.rate:.1f} % ({100 * low:.0f}-{100 * high:.0f}), {count.correct} of {count.asked}"
