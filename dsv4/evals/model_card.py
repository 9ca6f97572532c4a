"""README.md of the trained nano model: parameters, scores, training, data, commands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dsv4.analysis.parameters import count_parameters
from dsv4.checkpoint.atomic import new_file
from dsv4.config import ModelConfig
from dsv4.data.nano.build import count_parts
from dsv4.data.tasks import TASKS
from dsv4.evals.held_out import read_curve
from dsv4.evals.nano_suite import SuiteReport
from dsv4.evals.post_training_results import RESULTS, read_results
from dsv4.evals.results import MODES, Score, pooled, to_markdown
from dsv4.evals.results_card import describe_results
from dsv4.training.nano_recipe import PARTS, NanoRecipe
from dsv4.training.plots import read_metrics
from dsv4.training.recipe import read_recipe

CARD = """\
---
license: mit
library_name: dsv4
---
# dsv4 nano

A language model of DeepSeek V4's architecture in every respect (window, CSA and HCA attention, lightning indexer, hash
and score routing, hyper-connections of {hc} streams, MTP block), small enough for a laptop: {total:.1f} million
parameters, of which {active:.1f} million are active per token, {vocab:,} tokens. Weights are in the official layout
(FP4 experts, FP8 projections), {megabytes:.1f} MB. `recipes/nano.py` trained it from scratch.

It answers the verifiable tasks below, makes simple tool calls and small talk, says what words, terms and commands
mean, finds a fact in a long text, and says so where it cannot know an answer; in English. It can be wrong.

## Scores

Greedy decoding, {examples} questions per task and mode, none of them in training; Wilson 95 % intervals in brackets.
Mean over tasks, thinking: {thinking:.1f} %; non-thinking: {plain:.1f} %.

{table}
{unfinished} of {answers} answers did not end within the token limit.

{suite}
Open questions are written by hand and not in training; plain means words of the corpus's word list and punctuation,
no digits. Definitions: one of four, the right one and three of other terms of its kind, by likelihood; the wordings are
not in training. Bits per byte: pieces of 32,768 tokens; xz has each package as a whole. Haystacks: lines of held-out
packages, one fact asked about and three others.

{post_training}## Training

{training}
## Data

{data}
## Commands

```
{commands}
```

## Difficulty of the tasks

{tasks}"""
DATA = """\
{parts}
The texts are of Debian's documentation packages; they are not part of this repository.

{packages}"""
COMMANDS = """\
dsv4 train corpus --out corpus
dsv4 train nano --corpus corpus{length} --run-dir runs/nano --out models/nano
dsv4 train nano --resume --run-dir runs/nano --out models/nano
"""
EVALUATION = """\
dsv4 eval nano --model models/nano --n {examples} --data runs/nano/data --corpus corpus --ledger {ledger} \\
    --card {source}"""
SECTION = re.compile(r"^## (Training|Data|Commands|Recipe)\n\n(.*?)\n(?=^## |\Z)", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^]]*\]\(([^)/]+)\)")
CURVE_ROWS = 12  # of a part's curve, about


@dataclass(frozen=True)
class Origin:
    """History of a model for its card, in Markdown."""

    training: str
    data: str
    commands: str  # without that of the evaluation


def write_model_card(folder: Path, scores: Sequence[Score], source: Path, suite: SuiteReport) -> None:
    """Write `folder`/README.md, and copies of the training's pictures, from the scores and `source`.

    `source` is the folder of nano's run, or the card of a model that `folder`'s was trained from (`dsv4 train v4`):
    its sections on training, data and commands hold for both. ValueError if that card lacks one.
    """
    config = ModelConfig.from_pretrained(folder)
    counts = count_parameters(config)
    origin = _of_card(source, folder) if source.is_file() else _of_run(source, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    examples = max((score.examples for score in scores), default=0)
    of_student = source.is_file()
    evaluation = EVALUATION.format(
        examples=examples,
        source="README.md" if of_student else "runs/nano",
        ledger="runs/v4/eval.jsonl" if of_student else "runs/nano/eval.jsonl",
    )
    text = CARD.format(
        hc=config.hc_mult,
        total=counts.total_with_mtp / 1e6,
        active=counts.active / 1e6,
        vocab=config.vocab_size,
        megabytes=size / 1e6,
        examples=examples,
        thinking=100 * mean_over_tasks(scores, MODES[0]),
        plain=100 * mean_over_tasks(scores, MODES[1]),
        table=to_markdown(scores),
        unfinished=sum(score.unfinished for score in scores),
        answers=sum(pooled(scores, mode).examples for mode in MODES),
        suite=suite.to_markdown(),
        post_training=describe_post_training(folder),
        training=origin.training,
        data=origin.data,
        commands=origin.commands + evaluation,
        tasks="".join(f"- {name}: {task.difficulty}\n" for name, task in TASKS.items()),
    )
    with new_file(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _of_run(run_dir: Path, folder: Path) -> Origin:
    recipe = read_recipe(NanoRecipe, run_dir / "nano.toml")
    parts = [describe_training(recipe, run_dir), _copy_pictures(run_dir, folder), describe_curve(run_dir)]
    data = DATA.format(parts=_data_table(run_dir / "data"), packages=_packages(Path(recipe.data.corpus) / "card.json"))
    length = f" --steps {recipe.steps}" if recipe.steps else ""
    return Origin("\n".join(parts), data, COMMANDS.format(length=length))


def _of_card(card: Path, folder: Path) -> Origin:
    sections = _sections(card)
    for name in ("Training", "Data", "Commands"):
        if name not in sections:
            raise ValueError(f"{card} has no section {name}; wanted is the card of a trained model")
    if card.parent.resolve() != folder.resolve():
        for name in PICTURE.findall(sections["Training"]):
            shutil.copyfile(card.parent / name, folder / name)
    commands = sections["Commands"].removeprefix("```\n").removesuffix("\n```\n")
    return Origin(sections["Training"], sections["Data"], commands.partition("dsv4 eval nano")[0])


def _sections(card: Path) -> dict[str, str]:
    """Text of a card's sections on how the model came to be, by their titles."""
    return dict(SECTION.findall(card.read_text(encoding="utf-8"))) if card.is_file() else {}


def mean_over_tasks(scores: Sequence[Score], mode: str) -> float:
    """Mean of the tasks' rates in a mode, each task counting once; 0 without scores."""
    rates = [score.rate for score in scores if score.mode == mode]
    return sum(rates) / len(rates) if rates else 0.0


def describe_training(recipe: NanoRecipe, run_dir: Path) -> str:
    """Markdown table of a run's stages (steps, tokens, hours, last loss), then the run's main settings."""
    lines = [
        "| part | stage | steps | tokens so far | hours so far | loss, mean of its last 20 steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    settings: list[str] = []
    for part in PARTS:
        if not (run_dir / part / "metrics.jsonl").exists():
            continue
        entries = read_metrics(run_dir / part)
        for stage, group in groupby(entries, key=lambda entry: entry["stage"]):
            steps = list(group)
            loss, last = sum(entry["loss"] for entry in steps[-20:]) / len(steps[-20:]), steps[-1]
            hours = last["seconds"] / 3600
            lines.append(f"| {part} | {stage} | {len(steps)} | {last['tokens']:,} | {hours:.2f} | {loss:.4f} |")
        found = getattr(recipe, part)
        decay, stored = 100 * found.optimizer.decay_fraction, 100 * found.run.quantized_share
        trained = run_dir / part / "config.json"  # the recipe's preset may be another by now
        scaling = ModelConfig.from_pretrained(trained).rope_scaling if trained.is_file() else None
        reach = f", YaRN for more than {scaling.original_max_position_embeddings:,} tokens" if scaling else ""
        settings.append(
            f"{part}: peak rate {found.optimizer.rate:g}, the last {decay:.0f} % of the steps decay, the last "
            f"{stored:.0f} % are trained with the stored FP4/FP8 values, seed {found.run.seed}{reach}"
        )
    return "\n".join(lines) + f"\n\nMuon for matrices, AdamW for the rest. {'; '.join(settings)}.\n"


def describe_curve(run_dir: Path) -> str:
    """Markdown table of the held-out packages' bits per byte over training; nothing without a curve."""
    curves = {part: read_curve(run_dir / part / "held_out.jsonl") for part in PARTS}
    found = {part: rows for part, rows in curves.items() if rows}
    if not found:
        return ""
    names = list(next(iter(found.values()))[0]["bits_per_byte"])
    lines = [f"| part | tokens | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for part, rows in found.items():
        apart = max(1, len(rows) // CURVE_ROWS)
        for row in [*rows[:-1:apart], rows[-1]]:
            cells = [f"{row['bits_per_byte'][name]:.3f}" for name in names]
            lines.append(f"| {part} | {row['tokens']:,} | {' | '.join(cells)} |")
    return (
        "Bits per byte of samples of held-out packages in training, pieces of 4,096 tokens:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def describe_post_training(folder: Path) -> str:
    """Markdown section of a student's results; nothing for a model that is none."""
    if not (folder / RESULTS).exists():
        return ""
    results = describe_results(read_results(folder))
    recipe = _sections(folder / "README.md").get("Recipe")  # the card that `dsv4 train v4` wrote, or one of before
    made = f"## Recipe\n\n{recipe.rstrip()}\n\n" if recipe else ""
    return f"## Post-training\n\nOne student of four specialists (`dsv4 train v4`).\n\n{results}\n{made}"


def _copy_pictures(run_dir: Path, folder: Path) -> str:
    """Copy the run's pictures to the model's folder; their Markdown."""
    found: list[str] = []
    for part in PARTS:
        for name in ("losses.png", "held_out.png"):
            source = run_dir / part / name
            if source.exists():
                shutil.copyfile(source, folder / f"{part}-{name}")
                found.append(f"![{part}: {name.removesuffix('.png')}]({part}-{name})\n")
    return "".join(found)


def _data_table(data: Path) -> str:
    """Markdown table of the parts of the data and their tokens."""
    rows = [f"| {part} | {tokens:,} |\n" for part, tokens in sorted(count_parts(data).items())]
    return "| part | tokens |\n| --- | --- |\n" + "".join(rows)


def _packages(card: Path) -> str:
    """Markdown table of the corpus's packages: version, bytes, licences; nothing without the corpus's card."""
    if not card.exists():
        return ""
    made: list[dict[str, Any]] = json.loads(card.read_text(encoding="utf-8"))["packages"]
    rows = [
        f"| {p['name']} | {p['version']} | {p['split']} | {p['bytes']:,} | {', '.join(p['licences'])} |\n" for p in made
    ]
    return "| package | version | split | bytes | licences |\n| --- | --- | --- | --- | --- |\n" + "".join(rows)
