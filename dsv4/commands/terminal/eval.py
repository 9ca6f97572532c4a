"""`dsv4 eval`: scores a model, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsv4.checkpoint.atomic import new_file
from dsv4.commands.options import CommandParser, add_model, count
from dsv4.data.tasks import TASKS
from dsv4.evals.model_card import write_model_card
from dsv4.evals.nano_suite import NEEDLE_TESTS, PARTS, SuiteReport, SuiteSettings, run_suite
from dsv4.evals.needles import LENGTHS
from dsv4.evals.results import MODES, to_json, to_table
from dsv4.evals.runner import MAX_TOKENS, Answered, evaluate, is_correct
from dsv4.model_folder import model_name, resolve_model

DESCRIPTION = (
    "Score a model on task questions that training never saw: greedy answers through the engine, batched. With --data "
    "and --corpus also on open questions, definitions, held-out packages and haystacks. Problems of the domains: "
    "dsv4 eval domains."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `dsv4 eval`."""
    parser = _parser()
    options = parser.parse_whole(arguments)
    parts = options.parts or ["tasks", *(PARTS if options.data and options.corpus else ())]
    if (wrong := _unusable(options, parts)) is not None:
        parser.error(wrong)
    model, console = resolve_model(options.model), Console(stderr=True)
    given = _suite_settings(options)
    if given is not None:
        given.open_ledger(model)  # so that a wrong one is refused before the tasks have taken minutes
    scores, answers = [], []
    if "tasks" in parts:
        scores, answers = evaluate(
            model,
            examples=options.n,
            tasks=options.tasks,
            modes=options.modes,
            max_tokens=options.max_tokens,
            device=options.device,
            console=console,
            reworded=options.reworded,
        )
    suite = SuiteReport()
    if given is not None:
        suite = run_suite(model, parts, given, lambda text: console.print(text, highlight=False))
    settings = {"model": model_name(model), "examples": options.n, "max_tokens": options.max_tokens, "greedy": True}
    settings |= {"reworded": True} if options.reworded else {}
    report = json.dumps(to_json(scores, settings) | {"suite": suite.to_json()}, indent=2)
    if options.json:
        print(report)
    else:
        if scores:
            Console().print(to_table(scores))
        print(suite.to_markdown(), end="")
    if options.output:
        _write(options.output, [report])
    if options.answers:
        _write(options.answers, [json.dumps(_answer_record(one), ensure_ascii=False) for one in answers])
    if options.card:
        write_model_card(model, scores, options.card, suite)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="dsv4 eval", description=DESCRIPTION)
    lengths = " ".join(map(str, LENGTHS))
    parser.add_argument(
        "suite", nargs="?", choices=("nano",), default="nano", help="what to score (default: %(default)s)"
    )
    add_model(parser, "--model")
    parser.add_argument("--n", type=count, default=100, help="questions per task and mode (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"only these of {', '.join(TASKS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument(
        "--reworded", action="store_true", help="ask the tasks in wordings that training never has, where they have any"
    )
    parser.add_argument("--max-tokens", type=count, default=MAX_TOKENS, help="of an answer (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="write every question and answer to FILE, one per line"
    )
    parser.add_argument("--data", type=Path, help="data/ of the run that trained the model: its word list and terms")
    parser.add_argument("--corpus", type=Path, help="corpus of the run: its held-out packages")
    parser.add_argument(
        "--parts", nargs="+", choices=("tasks", *PARTS), help="only these (default: all that --data and --corpus allow)"
    )
    parser.add_argument("--needle-tests", type=count, help=f"haystacks per depth (default: {NEEDLE_TESTS})")
    parser.add_argument("--needle-lengths", type=count, nargs="+", metavar="TOKENS", help=f"default: {lengths}")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="go on from, and add to, the results in FILE")
    parser.add_argument("--card", type=Path, metavar="RUN", help="write its card, from its run or from its base's card")
    return parser


def _suite_settings(options: argparse.Namespace) -> SuiteSettings | None:
    """Settings of the parts besides the tasks; None without the data and the corpus that they need."""
    if not (options.data and options.corpus):
        return None
    return SuiteSettings(
        corpus=options.corpus,
        data=options.data,
        ledger=options.ledger,
        needle_tests=options.needle_tests or NEEDLE_TESTS,
        needle_lengths=tuple(options.needle_lengths or LENGTHS),
        device=options.device,
    )


def _write(path: Path, lines: Sequence[str]) -> None:
    with new_file(path) as file:
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _unusable(options: argparse.Namespace, parts: Sequence[str]) -> str | None:
    """Faults of the flags, before minutes of scoring: parts that lack their data, files without a place."""
    others = [part for part in parts if part in PARTS]
    if others and not (options.data and options.corpus):
        return f"--parts {' '.join(parts)}: {', '.join(PARTS)} need --data and --corpus"
    if bool(options.data) != bool(options.corpus):
        return f"{'--data' if options.data else '--corpus'} alone; allowed: both --data and --corpus, or neither"
    if not others:
        for name in ("ledger", "needle_tests", "needle_lengths"):
            if getattr(options, name) is not None:
                return f"--{name.replace('_', '-')} is for {', '.join(PARTS)}; allowed: with --data and --corpus"
    if options.answers and "tasks" not in parts:
        return "--answers are of the tasks; allowed: with tasks in --parts"
    for name in ("output", "answers"):
        path: Path | None = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            return f"--{name} {path}: there is no folder {path.parent}"
    card: Path | None = options.card
    if card is not None and not card.is_file() and not (card / "nano.toml").is_file():
        return f"--card {card}; allowed: the folder of a run of nano, or a model's README.md"
    return None


def _answer_record(answered: Answered) -> dict[str, Any]:
    example = answered.example
    return {
        "task": example.task, "mode": answered.mode, "question": example.question, "expected": example.answer,
        "correct": is_correct(answered), "finished": answered.finished, "text": answered.text,
    }  # fmt: skip
