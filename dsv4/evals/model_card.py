"""README.md of a trained model folder: parameters, training run, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dsv4.analysis.parameters import count_parameters
from dsv4.checkpoint.atomic import new_file
from dsv4.config import ModelConfig
from dsv4.data.tasks import TASKS
from dsv4.evals.results import MODES, Score, pooled, to_markdown
from dsv4.training.plots import read_metrics

CARD = """\
---
license: mit
library_name: dsv4
---
# dsv4 nano

A language model of DeepSeek V4's architecture in every respect (window, CSA and HCA attention, lightning indexer, hash
and score routing, hyper-connections of {hc} streams, MTP block), small enough for a laptop: {total:.1f} million
parameters, of which {active:.1f} million are active per token. Weights are in the official layout (FP4 experts, FP8
projections), {megabytes:.1f} MB. `recipes/nano.py` trained it from scratch.

It answers the verifiable tasks below, makes simple tool calls and small talk, in English. Of the world it knows
a few capitals, colours and definitions that its training data spells out.

## Scores

Greedy decoding, {examples} questions per task and mode, none of them in training (`dsv4 eval nano --n {examples}`);
Wilson 95 % intervals in brackets. Mean over tasks, thinking: {thinking:.1f} %; non-thinking: {plain:.1f} %.

{table}
{unfinished} of {answers} answers did not end within the token limit.

## Training

{training}
## Difficulty of the tasks

{tasks}"""


def write_model_card(folder: Path, scores: Sequence[Score], run: Mapping[str, Any], run_dir: Path) -> None:
    """Write `folder`/README.md from the scores, the settings `run` and `run_dir`/metrics.jsonl."""
    config = ModelConfig.from_pretrained(folder)
    counts = count_parameters(config)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = CARD.format(
        hc=config.hc_mult,
        total=counts.total_with_mtp / 1e6,
        active=counts.active / 1e6,
        megabytes=size / 1e6,
        examples=max(score.examples for score in scores),
        thinking=100 * mean_over_tasks(scores, MODES[0]),
        plain=100 * mean_over_tasks(scores, MODES[1]),
        table=to_markdown(scores),
        unfinished=sum(score.unfinished for score in scores),
        answers=sum(pooled(scores, mode).examples for mode in MODES),
        training=describe_training(run, run_dir),
        tasks="".join(f"- {name}: {task.difficulty}\n" for name, task in TASKS.items()),
    )
    with new_file(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def mean_over_tasks(scores: Sequence[Score], mode: str) -> float:
    """Mean of the tasks' rates in a mode, each task counting once; 0 without scores."""
    rates = [score.rate for score in scores if score.mode == mode]
    return sum(rates) / len(rates) if rates else 0.0


def describe_training(run: Mapping[str, Any], run_dir: Path) -> str:
    """Markdown table of a run's stages (steps, tokens, hours, last loss), then the run's main settings."""
    entries = read_metrics(run_dir)
    lines = [
        "| stage | steps | tokens so far | hours so far | loss, mean of its last 20 steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stage, group in groupby(entries, key=lambda entry: entry["stage"]):
        steps = list(group)
        tail = steps[-20:]
        loss = sum(entry["loss"] for entry in tail) / len(tail)
        last = steps[-1]
        lines.append(f"| {stage} | {len(steps)} | {last['tokens']:,} | {last['seconds'] / 3600:.2f} | {loss:.4f} |")
    settings = ", ".join(
        f"{name} {run[name]}" for name in ("budget", "tokens_per_batch", "peak_lr", "replicas", "seed")
    )
    optimizer = (
        "Muon for matrices, AdamW for the rest; the last fifth of the steps trained with the stored FP4/FP8 values."
    )
    return "\n".join(lines) + f"\n\nSettings: {settings}. {optimizer}\n"
