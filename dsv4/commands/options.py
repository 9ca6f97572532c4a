"""What several commands share: how a command is declared, and its common options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Handler = Callable[[argparse.Namespace], "int | None"]


def add_command(
    commands: Any, name: str, handler: Handler, text: str, examples: str, **options: Any
) -> argparse.ArgumentParser:
    """Declares a command: its line in the list, its own help with examples, its handler."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(handler=handler, parser=parser)
    return parser


def add_model(parser: argparse.ArgumentParser, flag: str = "model") -> None:
    nargs: dict[str, Any] = {} if flag.startswith("-") else {"nargs": "?"}
    parser.add_argument(flag, metavar="MODEL", help="model folder (default: the embedded nano model)", **nargs)


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=None, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")


def add_weight_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-weight-check",
        action="store_true",
        help="load without looking for NaN and infinity in the weights, which reads them all",
    )
