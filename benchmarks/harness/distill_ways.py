"""Ways to make one student of two specialists, each trained from the same model, at equal tokens, and their scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.program import train
from dsv4.data.tasks import TASKS, Example
from dsv4.engine import LLM, SamplingParams
from dsv4.model_folder import resolve_model
from dsv4.post_training.averaging import average_models
from dsv4.post_training.distillation import DistillationRun, Estimate
from dsv4.post_training.gradient_noise import ESTIMATES, Noise, gradient_noise
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.recipe_run import make_policy, tokenizer_files
from dsv4.post_training.recipes import DistillationSection, DistillRecipe
from dsv4.post_training.rollouts import sample_rollouts
from dsv4.post_training.run_keys import OptimizerSection, RunSection, SamplingSection
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.training.export import export_model
from recipes import sft

SEED = 11  # of the held-out questions
START, MIXED, AVERAGED = "start", "mixed fine-tuning", "averaged weights"
NAMES: dict[Estimate, str] = {"full": "distilled, full vocabulary", "sampled": "distilled, sampled token"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the runs; `conversations` are those of a specialist."""

    conversations: int
    steps: int  # of distillation
    prompts: int  # per step
    max_tokens: int
    held_out: int  # questions per task
    batches: int  # of the gradient's noise
    sft_rate: float
    distill_rate: float
    row_tokens: int


@dataclass(frozen=True)
class Comparison:
    """Right answers by model and task, tokens that each way trained on, and the gradients' noise."""

    tasks: tuple[str, ...]
    asked: int
    correct: dict[str, dict[str, int]]
    tokens: dict[str, int]
    noise: dict[Estimate, Noise]


def compare(model: str, tasks: Sequence[str], sizes: Sizes, run_dir: Path) -> Comparison:
    """Train every way and score it. ValueError for tasks that are unknown, or spelled letter by letter."""
    for task in tasks:
        if task not in TASKS or TASKS[task].letterwise:
            allowed = sorted(name for name, one in TASKS.items() if not one.letterwise)
            raise ValueError(f"task {task}; allowed: {', '.join(allowed)}")
    start = resolve_model(model)
    run_dir.mkdir(parents=True)
    folders, tokens = {START: start}, {START: 0}
    specialists: dict[str, Path] = {}
    for task in tasks:
        data = _write(run_dir / f"{task}.jsonl", [task], sizes.conversations)
        specialists[task] = folders[f"specialist {task}"] = _tuned(start, data, run_dir / f"sft-{task}", sizes)
    noise: dict[Estimate, Noise] = {}
    for estimate in ESTIMATES:
        run = _distillation(start, specialists, estimate, sizes, run_dir / f"distill-{estimate}")
        if not noise:
            position = run.position.problems
            noise = gradient_noise(run, sizes.batches)
            run.position.problems = position
        run.run()
        folders[NAMES[estimate]] = run_dir / f"distill-{estimate}" / "model"
        export_model(run.policy.model, tokenizer_files(start, run.run_dir), folders[NAMES[estimate]])
        tokens[NAMES[estimate]] = run.position.tokens + _prompt_tokens(start, run)
    budget = tokens[NAMES["full"]]
    mixed = _write(run_dir / "mixed.jsonl", tasks, max(64, budget // 16))
    folders[MIXED] = _tuned(start, mixed, run_dir / "sft-mixed", sizes, budget)
    tokens[MIXED] = budget
    folders[AVERAGED], tokens[AVERAGED] = run_dir / "averaged", 0
    export_model(
        average_models(list(specialists.values())), tokenizer_files(start, run_dir / "files"), folders[AVERAGED]
    )
    correct = {name: score(LLM(folder), tasks, sizes) for name, folder in folders.items()}
    return Comparison(tuple(tasks), sizes.held_out, correct, tokens, noise)


def conversation(example: Example) -> dict[str, Any]:
    """A question and its answer in OpenAI's message format."""
    return {"messages": [*example.messages, {"role": "assistant", "content": example.answer}]}


def _write(path: Path, tasks: Sequence[str], count: int) -> Path:
    """`count` solved training questions, of the tasks in turn."""
    examples = (TASKS[tasks[n % len(tasks)]].sample(n).with_thinking(False) for n in range(count))
    path.write_text("".join(json.dumps(conversation(one)) + "\n" for one in examples), encoding="utf-8")
    return path


def _tuned(start: Path, data: Path, run_dir: Path, sizes: Sizes, tokens: int | None = None) -> Path:
    """Model folder after one pass over conversations, or `tokens` tokens of them, rounded up to whole steps."""
    words = [f"optimizer.rate={sizes.sft_rate}", f"stages.0.row_tokens={sizes.row_tokens}"]
    if tokens is not None:
        words.append(f"stages.0.tokens={tokens}")
    train(sft.main, [str(start), str(data), *words, "--max-tokens", str(sizes.row_tokens), "--run-dir", str(run_dir)])
    return run_dir / "model"


def _distillation(
    start: Path, specialists: dict[str, Path], estimate: Estimate, sizes: Sizes, run_dir: Path
) -> DistillationRun:
    recipe = DistillRecipe(
        problems=ProblemsSection(tasks=tuple(specialists), thinking=False),
        optimizer=OptimizerSection(rate=sizes.distill_rate),
        sampling=SamplingSection(prompts=sizes.prompts, max_tokens=sizes.max_tokens),
        run=RunSection(steps=sizes.steps),
        distillation=DistillationSection(estimate=estimate),
    )
    policy = make_policy(recipe, start)
    config = policy.model.config
    teachers = Teachers(
        {task: Teacher(folder) for task, folder in specialists.items()}, run_dir / "hidden", config.vocab_size
    )
    return DistillationRun(
        policy, recipe.optimizer.optimizer(policy.model, config), recipe.source(), teachers, recipe.loop(),
        recipe.settings(), run_dir, quiet=True,
    )  # fmt: skip


def _prompt_tokens(folder: Path, run: DistillationRun) -> int:
    prompts = PromptEncoder.from_pretrained(folder)
    asked = map(run.problems.problem, range(run.position.problems))
    return sum(len(prompts.encode(problem.prompt())) for problem in asked)


def score(llm: LLM, tasks: Sequence[str], sizes: Sizes) -> dict[str, int]:
    """Right answers of a model by task, greedily, on held-out questions without thinking."""
    assert llm.prompts is not None, "questions are asked in text"
    found: dict[str, int] = {}
    for task in tasks:
        asked = [TASKS[task].sample(SEED * 10**6 + n, "eval").with_thinking(False) for n in range(sizes.held_out)]
        prompts = [llm.prompts.encode(one.prompt()) for one in asked]
        answers = sample_rollouts(llm, prompts, 1, SamplingParams(max_tokens=sizes.max_tokens, temperature=0.0), 0)
        found[task] = sum(
            answer.finished and TASKS[task].score(one, answer.text) == 1.0
            for one, answer in zip(asked, answers, strict=True)
        )
    return found
