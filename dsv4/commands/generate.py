"""`dsv4 generate`: continue prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4.commands.options import add_command, add_flags, add_model, add_sampling, pick_flags
from dsv4.engine.config import EngineConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        run,
        "continue prompts as plain text, without a chat template",
        'dsv4 generate "def add(a, b):" --max-tokens 32\ndsv4 generate "1, 2, 3," --temperature 0 --json\n'
        'dsv4 generate "A person: " --json-schema \'{"type": "object"}\'',
        usage="%(prog)s [options] PROMPT [PROMPT ...]",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    add_model(parser, "--model")
    add_sampling(parser, max_tokens=64)
    add_flags(parser, EngineConfig, "generate")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    _add_constraints(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt, with token ids and logprobs")


def _add_constraints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what may be written").add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="SCHEMA", help="JSON of this schema: its text, or a file that has it")
    group.add_argument("--regex", metavar="REGEX", help="text that matches the whole regex")
    group.add_argument("--choice", action="append", default=[], metavar="TEXT", help="one of these texts; repeatable")


def _schema(given: str | None) -> str | None:
    """The text of a schema that is given as such, which begins with a brace, or as a file."""
    if given is None or given.lstrip().startswith("{"):
        return given
    return Path(given).read_text(encoding="utf-8")


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
        json_schema=_schema(options.json_schema),
        regex=options.regex,
        choice=options.choice or None,
        as_json=options.json,
        **pick_flags(options, EngineConfig),
    )
