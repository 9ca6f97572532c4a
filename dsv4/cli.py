"""The `dsv4` command: its list of commands and its error reporting. `--help` imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dsv4 import __version__
from dsv4.commands import (
    bench,
    chat,
    convert,
    data,
    eval,
    generate,
    inspect,
    migrate,
    plan,
    serve,
    train,
    usage,
    verify,
)
from dsv4.commands.options import CommandParser, Handler, nearest
from dsv4.kernels.cpu import KernelChoiceError

COMMANDS = (serve, chat, generate, inspect, convert, verify, data, train, plan, eval, bench, usage, migrate)

# Package that serving does not need -> the extra of pyproject.toml that installs it.
_EXTRAS = {
    "reasoning_gym": "train",
    "pyarrow": "train",
    "resiliparse": "train",
    "tomli_w": "train",
    "transformers": "bench",
    "psutil": "bench",
    "sqlalchemy": "usage",
    "psycopg": "usage",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit status. An error that the user can fix (path, value, file): one stderr line, status 2.

    DSV4_TRACEBACK=1 shows the traceback of such an error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    if not arguments[0].startswith("-") and arguments[0] not in names:
        parser.error(f"no command {arguments[0]}{nearest(arguments[0], names)}")
    options, unknown = parser.parse_known_args(arguments)
    if "overrides" in options:  # argparse takes words that are behind a flag for unknown
        options.overrides += [word for word in unknown if _is_override(word)]
        unknown = [word for word in unknown if not _is_override(word)]
    if unknown and options.command == "eval":  # eval parses its own arguments
        options.arguments = unknown + options.arguments
    elif unknown:
        options.parser.refuse(unknown)
    handler: Handler = options.handler
    try:
        status = handler(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None or os.environ.get("DSV4_TRACEBACK") == "1":
            raise
        print(
            f"dsv4 {options.command}: error: {error.name} is not installed; it comes with the extra {extra!r}: "
            f"in the repository, .venv/bin/pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, KernelChoiceError) as error:
        if os.environ.get("DSV4_TRACEBACK") == "1":
            raise
        print(f"dsv4 {options.command}: error: {options.parser.with_flag(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _is_override(word: str) -> bool:
    """True for KEY=VALUE."""
    return "=" in word and not word.startswith("-")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="dsv4",
        description="DeepSeek V4: run it, look into it, convert it, train it.",
        epilog="MODEL is a model folder, or owner/name of the Hugging Face Hub, which is fetched; without one, serve,\n"
        "chat, generate, verify and eval use the embedded nano model.\n"
        "examples:\n  dsv4 serve\n  dsv4 serve deepseek-ai/DeepSeek-V4-Flash\n  dsv4 chat\n  dsv4 inspect flash",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dsv4 {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
