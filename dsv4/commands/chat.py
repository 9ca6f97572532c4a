"""`dsv4 chat`: chat in the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import EFFORTS, add_command, add_flags, add_model, add_sampling, pick_flags
from dsv4.engine.config import EngineConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "chat",
        run,
        "talk to a model in the terminal",
        "dsv4 chat\ndsv4 chat --no-thinking --temperature 0",
        usage="%(prog)s [options] [MODEL]",
    )
    add_model(parser)
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--no-thinking", action="store_true", help="answer at once")
    thinking.add_argument("--effort", choices=EFFORTS, default=None, help="how much to think")
    add_sampling(parser, max_tokens=1024)
    add_flags(parser, EngineConfig, "chat")


def run(options: argparse.Namespace) -> int | None:
    from dsv4.commands.terminal.chat import chat

    return chat(
        options.model,
        thinking=not options.no_thinking,
        effort=options.effort,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        **pick_flags(options, EngineConfig),
    )
