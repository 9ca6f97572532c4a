"""`dsv4 eval`: scores a model, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsv4.checkpoint.atomic import new_file
from dsv4.commands.options import CommandParser
from dsv4.data.tasks import TASKS
from dsv4.evals.results import MODES, to_json, to_table
from dsv4.evals.runner import MAX_TOKENS, Answered, evaluate, is_correct
from dsv4.model_folder import model_name, resolve_model

DESCRIPTION = "Score a model on task questions that training never saw: greedy answers through the engine, batched."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `dsv4 eval`."""
    parser = CommandParser(prog="dsv4 eval", description=DESCRIPTION)
    parser.add_argument(
        "suite", nargs="?", choices=("nano",), default="nano", help="what to score (default: %(default)s)"
    )
    parser.add_argument("--model", help="model folder, or owner/name[@revision] (default: the embedded nano model)")
    parser.add_argument("--n", type=int, default=100, help="questions per task and mode (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"only these of {', '.join(TASKS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="write every question and answer to FILE, one per line"
    )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.refuse(unknown)
    if options.n < 1:
        parser.error(f"--n is {options.n}; allowed: 1 or more")
    model = resolve_model(options.model)
    scores, answers = evaluate(
        model, options.n, options.tasks, options.modes, options.max_tokens, options.device, Console(stderr=True)
    )
    settings = {"model": model_name(model), "examples": options.n, "max_tokens": options.max_tokens, "greedy": True}
    report = json.dumps(to_json(scores, settings), indent=2)
    if options.output:
        with new_file(options.output) as file:
            file.write_text(report + "\n", encoding="utf-8")
    if options.answers:
        lines = (json.dumps(_answer_record(answered), ensure_ascii=False) for answered in answers)
        with new_file(options.answers) as file:
            file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if options.json:
        print(report)
    else:
        Console().print(to_table(scores))
    return 0


def _answer_record(answered: Answered) -> dict[str, Any]:
    example = answered.example
    return {
        "task": example.task, "mode": answered.mode, "question": example.question, "expected": example.answer,
        "correct": is_correct(answered), "finished": answered.finished, "text": answered.text,
    }  # fmt: skip
