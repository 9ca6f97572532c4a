"""Evaluation of a whole run, its results and the record of its course, from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.checkpoint.atomic import new_file
from dsv4.engine import LLM
from dsv4.evals.domain_scores import DomainScore, evaluate_domain
from dsv4.evals.effort_scores import evaluate_efforts, to_results
from dsv4.evals.post_training_results import Count, Effort, Results, make_results
from dsv4.evals.results import MODES, pooled
from dsv4.evals.results_page import RunRecord, StageRecord
from dsv4.evals.runner import answer_all, questions, summarise
from dsv4.post_training.domains.registry import open_domain
from dsv4.post_training.effort_names import Mode
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.stage_run import StageTime
from dsv4.post_training.train_serve import train_serve_difference
from dsv4.post_training.v4_recipe import DOMAINS, V4Recipe
from dsv4.post_training.v4_run import RunFolders, tokens_of
from dsv4.training.plots import read_metrics

RUNNING = 32  # requests at a time
SAMPLED = 16  # answers of the student whose log-probabilities are computed again


def evaluate_model(folder: Path, recipe: V4Recipe, path: Path) -> None:
    """Write a model's counts in every domain to `path`."""
    llm = LLM(folder, max_num_seqs=RUNNING, device=recipe.device)
    _write(path, {domain: _count(_score(llm, domain, recipe)) for domain in DOMAINS})


def evaluate_fine_tuned(folders: RunFolders, recipe: V4Recipe) -> None:
    """Write the counts of each specialist before its GRPO, in its own domain."""
    found: dict[str, dict[str, int]] = {}
    for domain in DOMAINS:
        llm = LLM(folders.tuned(domain), max_num_seqs=RUNNING, device=recipe.device)
        found[domain] = _count(_score(llm, domain, recipe))
    _write(folders.fine_tuned, found)


def evaluate_general(folders: RunFolders, recipe: V4Recipe) -> None:
    """Write the counts of the start, of its teacher and of the student on the general tasks, in each mode."""
    tasks, section = recipe.general.tasks, recipe.evaluation
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, folder in (("start", folders.start), ("teacher", folders.general), ("student", folders.student)):
        llm = LLM(folder, max_num_seqs=RUNNING, device=recipe.device)
        asked = questions(tasks, MODES, max(1, section.questions // len(tasks)))
        sums = [pooled(summarise(answer_all(llm, asked, section.max_tokens)), mode) for mode in MODES]
        found[name] = {score.mode: {"correct": score.correct, "asked": score.examples} for score in sums}
    _write(folders.general_scores, found)


def _score(llm: LLM, domain: str, recipe: V4Recipe) -> DomainScore:
    section, specialist = recipe.evaluation, getattr(recipe.specialists, domain)
    return evaluate_domain(
        llm, domain, section.questions, section.seed, thinking=specialist.thinking, efforts=specialist.efforts,
        max_tokens=section.max_tokens, level=recipe.level,
    )  # fmt: skip


def write_efforts(folder: Path, recipe: V4Recipe, path: Path) -> None:
    """Write a model's accuracy and mean tokens at every level of reasoning to `path`, within its window and without."""
    llm, section = LLM(folder, max_num_seqs=RUNNING, device=recipe.device), recipe.evaluation
    grpo: GRPORecipe = getattr(recipe.specialists, section.effort_domain).grpo
    modes = grpo.efforts.modes(section.efforts, grpo.sampling.max_tokens)
    windows: dict[Mode, int | None] = {mode.effort: mode.window for mode in modes}
    within, free = (
        to_results(
            evaluate_efforts(
                llm, section.effort_domain, section.questions, section.seed, section.max_tokens, recipe.level,
                section.efforts, given,
            )
        )
        for given in (windows, None)
    )  # fmt: skip
    _write(path, {level: found | {"free": free[level]} for level, found in within.items()})


def collect_results(folders: RunFolders, recipe: V4Recipe) -> Results:
    """Results of a run whose models are all evaluated; the student is sampled once more for train = serve."""
    scores = _counts({name: _read(folders.scores(name)) for name in folders.models()})
    efforts = {level: Effort.model_validate(value) for level, value in _read(folders.efforts).items()}
    section, level = recipe.evaluation, recipe.level
    problems = [
        open_domain(DOMAINS[n % len(DOMAINS)], level=level).problem(section.seed, n, "eval") for n in range(SAMPLED)
    ]
    shipped = train_serve_difference(folders.student, problems, section.max_tokens, section.seed, recipe.device)
    tuned = _counts({"": _read(folders.fine_tuned)})[""]
    general = _counts(_read(folders.general_scores)) if recipe.general.asked else {}
    return make_results(scores, efforts, largest([shipped, *differences(folders).values()]), tuned, general)


def largest(found: Iterable[float | None]) -> float | None:
    """Largest of measured values; None if one was not measured, for it might be larger."""
    values = list(found)
    measured = [value for value in values if value is not None]
    return max(measured) if measured and len(measured) == len(values) else None


def differences(folders: RunFolders) -> dict[str, float | None]:
    """Largest difference of train and serve in every run that sampled; None if no step of it was measured."""
    return {name: max(_measured(read_metrics(run)), default=None) for name, run in folders.sampled().items()}


def collect_record(folders: RunFolders, times: Iterable[StageTime], command: str, made_by: Sequence[str]) -> RunRecord:
    """Course of a run, for its page; its command, and its seed, code and machine in words."""
    runs = {
        **{f"specialists.{domain}.sft": folders.tuned(domain).parent for domain in DOMAINS},
        **{f"specialists.{domain}.grpo": folders.specialist(domain).parent for domain in DOMAINS},
        "general.grpo": folders.general.parent,
        "base": folders.nano / "base",
        "sft": folders.nano / "sft",
        "student": folders.student.parent,
        "mixed": folders.mixed.parent,
    }
    tokens = {name: tokens_of(folder) for name, folder in runs.items() if (folder / "metrics.jsonl").exists()}
    return RunRecord(
        title="dsv4: specialists and their student",
        grpo={
            name.removeprefix("specialists."): read_metrics(run)
            for name, run in folders.sampled().items()
            if name != "student"
        },
        student=read_metrics(folders.student.parent),
        stages=[
            StageRecord(one.name, folders.without_place(one.command), one.seconds, tokens.get(one.name, 0))
            for one in times
        ],
        differences=differences(folders),
        command=command,
        made_by=made_by,
    )


def _measured(rows: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """Differences of the steps that have one: those with updates, and no token of older weights."""
    return (float(row["train_serve_difference"]) for row in rows if "train_serve_difference" in row)


def _counts(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Count]]:
    return {name: {key: Count.model_validate(count) for key, count in row.items()} for name, row in table.items()}


def _count(score: DomainScore) -> dict[str, int]:
    return {"correct": score.correct, "asked": score.asked}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
