"""`dsv4 generate`: continue prompts."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command, add_flags, add_model, add_sampling, pick_flags
from dsv4.engine.config import EngineConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        run,
        "continue prompts as plain text, without a chat template",
        'dsv4 generate "def add(a, b):" --max-tokens 32\ndsv4 generate "1, 2, 3," --temperature 0 --json',
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    add_model(parser, "--model")
    add_sampling(parser, max_tokens=64)
    add_flags(parser, EngineConfig, "generate")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt, with token ids and logprobs")


def run(options: argparse.Namespace) -> int | None:
    from dsv4.commands.terminal.generate import generate

    return generate(
        options.model,
        options.prompts,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        as_json=options.json,
        **pick_flags(options, EngineConfig),
    )
