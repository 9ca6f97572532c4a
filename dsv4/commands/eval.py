"""`dsv4 eval`: score a model."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "eval",
        run,
        "score a model on tasks it has not seen, with confidence intervals",
        "dsv4 eval nano\ndsv4 eval nano --model path/to/model\ndsv4 eval domains --domains code tools --n 50",
        add_help=False,
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int | None:
    if options.arguments[:1] == ["domains"]:
        from dsv4.commands.terminal.eval_domains import main as score_domains

        return score_domains(options.arguments[1:])
    from dsv4.commands.terminal.eval import main

    return main(options.arguments)
