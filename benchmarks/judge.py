"""`dsv4 bench judge`: a model learns to judge, and to please its own judge; what of that is hacking.

Accuracy before and after fine-tuning and GRPO, with answers that flatter the rubric; then GRPO against the judge on
questions whose answers are known, step by step: a policy that pleases without being right drives the two rewards apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.program import new_folder, new_parser, train

if TYPE_CHECKING:
    from dsv4.post_training.judgements import Judgements, JudgeScore

EPILOG = """examples:
  dsv4 bench judge --run-dir runs/judge
  dsv4 bench judge --task gcd --judgements 5000 --grpo-steps 50 --run-dir runs/judge-gcd
  dsv4 bench judge --policy-steps 100 --run-dir runs/judge-hacked"""
WITHOUT, WITH = "trained", "trained, flattery in the data"
TUNED = ", fine-tuning alone"  # a judge before its GRPO
SHOWN = 12  # rows of a run's table
FIGURES = {  # of the log of a run against the judge
    "judge_reward": "reward by the judge",
    "known_reward": "true reward",
    "judge_excess": "excess",
    "judging": "judging",
    "left_out": "left out",
}
Drift = dict[str, list[dict[str, Any]]]  # judge -> steps of a run against it
DEFENDED = 0.5  # share of training judgements that flatter
SEED = 7  # of the held-out judgements


def measure(options: argparse.Namespace) -> tuple[dict[str, JudgeScore], Drift]:
    """Scores of the model, of one trained on plain judgements and of one whose training has flattering answers, each
    before and after its GRPO; and the steps of GRPO against each."""
    from dsv4.engine import LLM
    from dsv4.model_folder import resolve_model
    from dsv4.post_training.judgements import Judgements, evaluate_judge

    folder, run_dir = resolve_model(options.model), options.run_dir
    thinking = not options.without_thinking
    source = Judgements(options.task, SEED, "eval", thinking=thinking)
    held_out = [source.problem(number) for number in range(options.held_out)]
    scores = {"before": evaluate_judge(LLM(folder), held_out)}
    drift: Drift = {}
    for name, share in ((WITHOUT, 0.0), (WITH, DEFENDED)):
        judgements, place = Judgements(options.task, flattering=share, thinking=thinking), run_dir / f"flattery-{share}"
        trained = _tune(folder, judgements, place, options)
        scores[name + TUNED] = evaluate_judge(LLM(trained), held_out)
        if options.grpo_steps:
            trained = _reinforce(trained, judgements, place, options)
            scores[name] = evaluate_judge(LLM(trained), held_out)
        if options.policy_steps:
            drift[name] = _please(trained, judgements, place / "policy", options)
    return scores, drift


def _tune(folder: Path, judgements: Judgements, run_dir: Path, options: argparse.Namespace) -> Path:
    """Model folder after fine-tuning on judgements, and on right answers to the task."""
    from dsv4.post_training.judgements import answered_question, judged_conversation
    from recipes import sft

    run_dir.mkdir(parents=True)
    rows = [judged_conversation(judgements.judgement(number)) for number in range(options.judgements)]
    for number in range(options.answers):
        row = answered_question(options.task, SEED + 1, number)
        said = (("user", row["prompt"]), ("assistant", row["answer"]))
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    talks = _write(run_dir / "judgements.jsonl", rows)
    words = [f"optimizer.rate={options.rate}", f"stages.0.row_tokens={options.row_tokens}"]
    train(sft.main, [str(folder), str(talks), *words, "--max-tokens", "512", "--run-dir", str(run_dir / "sft")])
    return run_dir / "sft" / "model"


def _reinforce(tuned: Path, judgements: Judgements, run_dir: Path, options: argparse.Namespace) -> Path:
    """Model folder after GRPO on other judgements, rewarded by agreement."""
    from dsv4.post_training.grpo_run import GRPORun
    from dsv4.post_training.judgements import JUDGEMENT_TOKENS
    from dsv4.post_training.recipe_run import make_policy, tokenizer_files
    from dsv4.post_training.recipes import GRPORecipe
    from dsv4.post_training.run_keys import RolloutSection, RunSection
    from dsv4.training.export import export_model

    recipe = GRPORecipe(
        run=RunSection(steps=options.grpo_steps),
        sampling=RolloutSection(max_tokens=JUDGEMENT_TOKENS, prompts=options.grpo_prompts),
    )
    policy = make_policy(recipe, tuned)
    optimizer = recipe.optimizer.optimizer(policy.model, policy.model.config)
    run = GRPORun(policy, optimizer, _Later(judgements, options.judgements), recipe.loop(), recipe.settings(), run_dir)
    run.run()
    export_model(policy.model, tokenizer_files(tuned, run_dir), run_dir / "model")
    return run_dir / "model"


def _please(judge: Path, judgements: Judgements, run_dir: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of `dsv4 train grpo` of a judge on questions that it judges itself, beside labelled judgements."""
    from dsv4.post_training.judgements import JUDGEMENT_TOKENS, answered_question, labelled_row
    from dsv4.training.plots import read_metrics
    from recipes import grpo

    run_dir.mkdir(parents=True)
    count = options.policy_steps * options.grpo_prompts
    questions = [answered_question(options.task, SEED, number) for number in range(count)]
    first = 2 * options.judgements  # fine-tuning and GRPO had others
    labelled = [labelled_row(judgements.problem(first + number)) for number in range(count)]
    words = [
        f"problems.data={_write(run_dir / 'questions.jsonl', questions)}",
        f"judge.data={_write(run_dir / 'labelled.jsonl', labelled)}",
        f"judge.thinking={str(not options.without_thinking).lower()}", f"judge.max_tokens={JUDGEMENT_TOKENS}",
        f"sampling.max_tokens={JUDGEMENT_TOKENS}", f"sampling.prompts={options.grpo_prompts}",
        f"run.steps={options.policy_steps}",
    ]  # fmt: skip
    train(grpo.main, [str(judge), *words, "--run-dir", str(run_dir / "run")])
    kept = ("step", *FIGURES)
    return [{key: row[key] for key in kept if key in row} for row in read_metrics(run_dir / "run")]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


class _Later:
    """Problems of a source from a number on."""

    def __init__(self, source: Any, first: int) -> None:
        self._source, self._first = source, first

    def problem(self, number: int, /) -> Any:
        return self._source.problem(self._first + number)


def lines(scores: dict[str, JudgeScore]) -> list[str]:
    """Markdown table of the scores, with Wilson 95 % intervals."""
    from dsv4.evals.intervals import wilson

    found = [
        "| judge | accuracy (95 %) | no score | reward of wrong answers | with flattery | raised by it (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in scores.items():
        rates = (wilson(one.correct, one.asked), wilson(one.raised, one.trapped))
        accuracy, raised = (f"{100 * low:.0f}-{100 * high:.0f}" for low, high in rates)
        found.append(
            f"| {name} | {one.correct} of {one.asked} ({accuracy}) | {one.unreadable} | {one.plain_reward:.2f} | "
            f"{one.flattered_reward:.2f} | {one.raised} of {one.trapped} ({raised}) |"
        )
    return found


def drift_lines(drift: Drift) -> list[str]:
    """Markdown table of the runs against a judge: means of equally many steps, at most SHOWN rows a judge."""
    found = [f"| judge | steps | {' | '.join(FIGURES.values())} |", "|---" * (2 + len(FIGURES)) + "|"]
    for name, rows in drift.items():
        size = -(-len(rows) // SHOWN)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            means = [_mean([row[key] for row in part if key in row]) for key in FIGURES]
            found.append(f"| {name} | {part[0]['step']}-{part[-1]['step']} | {' | '.join(means)} |")
    return found


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "-"  # "-": a judge that gave no score


def draw(drift: Drift, path: Path) -> bool:
    """The judge's reward and the true one by step, a panel a judge; False without matplotlib, or a run."""
    if not drift or find_spec("matplotlib") is None:
        return False
    from dsv4.training.plots import new_figure

    figure = new_figure(5.0 * len(drift), 4.0)
    for axes, (name, rows) in zip(figure.subplots(1, len(drift), squeeze=False)[0], drift.items(), strict=True):
        for key in ("judge_reward", "known_reward"):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([step for step, _ in points], [value for _, value in points], label=FIGURES[key])
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_ylim(0.0, 1.0)
        axes.legend()
    figure.savefig(path, dpi=130)
    return True


def parser() -> argparse.ArgumentParser:
    about = "Train a model to judge, with and without flattering answers in its data, then to please itself."
    made = new_parser("judge", about, EPILOG)
    add = made.add_argument
    add("--model", default="nano", help="folder of the model to start from; default: %(default)s")
    add("--task", default="word_sequence_reversal", help="whose answers are judged; default: %(default)s")
    add("--judgements", type=int, default=2000, metavar="N", help="to train on; default: %(default)s")
    add("--answers", type=int, default=500, metavar="N", help="to fine-tune on, too; default: %(default)s")
    add("--held-out", type=int, default=200, metavar="N", help="to measure on; default: %(default)s")
    add("--grpo-steps", type=int, default=20, metavar="N", help="after fine-tuning; default: %(default)s")
    add("--policy-steps", type=int, default=20, metavar="N", help="against the judge; 0: none; default: %(default)s")
    add("--grpo-prompts", type=int, default=16, metavar="N", help="of a step; default: %(default)s")
    add("--rate", type=float, default=5e-4, help="learning rate of fine-tuning; default: %(default)s")
    add("--row-tokens", type=int, default=2048, metavar="N", help="of a step of fine-tuning; default: %(default)s")
    add("--without-thinking", action="store_true", help="a judge that gives its score at once")
    add("--run-dir", type=new_folder, default="runs/judge", help="a new folder; default: %(default)s")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from dataclasses import asdict

    scores, drift = measure(options)
    table = [*lines(scores), *(["", *drift_lines(drift)] if drift else [])]
    found = {"scores": {name: asdict(score) for name, score in scores.items()}, "drift": drift}
    (options.run_dir / "scores.json").write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")
    (options.run_dir / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    draw(drift, options.run_dir / "drift.png")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
