"""`dsv4 bench judge`: a model learns to judge; accuracy before and after, and answers that flatter the rubric."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.post_training.judgements import Judgements, JudgeScore

EPILOG = """examples:
  dsv4 bench judge --run-dir runs/judge
  dsv4 bench judge --task gcd --judgements 5000 --grpo-steps 50 --run-dir runs/judge-gcd"""
WITHOUT, WITH = "trained", "trained, flattery in the data"
DEFENDED = 0.5  # share of training judgements that flatter
SEED = 7  # of the held-out judgements


def measure(options: argparse.Namespace) -> dict[str, JudgeScore]:
    """Scores of the model, of one trained on plain judgements, and of one whose training has flattering answers."""
    from dsv4.engine import LLM
    from dsv4.model_folder import resolve_model
    from dsv4.post_training.judgements import Judgements, evaluate_judge

    folder, run_dir = resolve_model(options.model), Path(options.run_dir)
    thinking = not options.without_thinking
    source = Judgements(options.task, SEED, "eval", thinking=thinking)
    held_out = [source.problem(number) for number in range(options.held_out)]
    scores = {"before": evaluate_judge(LLM(folder), held_out)}
    for name, share in ((WITHOUT, 0.0), (WITH, DEFENDED)):
        judgements = Judgements(options.task, flattering=share, thinking=thinking)
        trained = _train(folder, judgements, run_dir / f"flattery-{share}", options)
        scores[name] = evaluate_judge(LLM(trained), held_out)
    return scores


def _train(folder: Path, judgements: Judgements, run_dir: Path, options: argparse.Namespace) -> Path:
    """Model folder after fine-tuning on judgements, and GRPO on others of them, rewarded by agreement."""
    from dsv4.post_training.grpo_run import GRPORun
    from dsv4.post_training.judgements import JUDGEMENT_TOKENS, judged_conversation
    from dsv4.post_training.recipe_run import make_policy, tokenizer_files
    from dsv4.post_training.recipes import GRPORecipe, RolloutSection, RunSection
    from dsv4.training.export import export_model
    from recipes import sft

    run_dir.mkdir(parents=True)
    talks = run_dir / "judgements.jsonl"
    lines = (json.dumps(judged_conversation(judgements.judgement(n))) for n in range(options.judgements))
    talks.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = [f"optimizer.rate={options.rate}", f"stages.0.row_tokens={options.row_tokens}"]
    sft.main([str(folder), str(talks), *words, "--max-tokens", "512", "--run-dir", str(run_dir / "sft")])
    tuned = run_dir / "sft" / "model"
    if not options.grpo_steps:
        return tuned
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


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="dsv4 bench judge",
        description="Train a model to judge, with and without flattering answers in its data, and measure its judging.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", default="nano", help="folder of the model to start from; default: %(default)s")
    add("--task", default="word_sequence_reversal", help="whose answers are judged; default: %(default)s")
    add("--judgements", type=int, default=2000, metavar="N", help="to train on; default: %(default)s")
    add("--held-out", type=int, default=200, metavar="N", help="to measure on; default: %(default)s")
    add("--grpo-steps", type=int, default=20, metavar="N", help="after fine-tuning; default: %(default)s")
    add("--grpo-prompts", type=int, default=16, metavar="N", help="of a step; default: %(default)s")
    add("--rate", type=float, default=5e-4, help="learning rate of fine-tuning; default: %(default)s")
    add("--row-tokens", type=int, default=2048, metavar="N", help="of a step of fine-tuning; default: %(default)s")
    add("--without-thinking", action="store_true", help="a judge that gives its score at once")
    add("--run-dir", type=Path, default=Path("runs/judge"), help="a new folder; default: %(default)s")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(argv)
    if options.run_dir.exists():
        made.error(f"{options.run_dir} is there; allowed: a new folder")
    from dataclasses import asdict

    scores = measure(options)
    table = lines(scores)
    text = json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1)
    (options.run_dir / "scores.json").write_text(f"{text}\n", encoding="utf-8")
    (options.run_dir / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
