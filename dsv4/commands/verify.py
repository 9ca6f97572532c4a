"""`dsv4 verify`: compare logits with an independent implementation."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command, add_flags, add_model
from dsv4.engine.config import EngineConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        run,
        "compare a model's logits with an independent implementation",
        "dsv4 verify path/to/model --against transformers",
    )
    add_model(parser)
    parser.add_argument("--against", choices=("transformers",), default="transformers", help="default: %(default)s")
    add_flags(parser, EngineConfig, "verify")


def run(options: argparse.Namespace) -> int | None:
    from dsv4.evals.verify import verify
    from dsv4.model_folder import resolve_model

    return verify(resolve_model(options.model, options.revision), options.against)
