"""Declaration of a command, and options shared by several commands."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from dsv4.options import Option, format_size, options_of, parse_size

EFFORTS = ("low", "high", "max")  # of reasoning
Handler = Callable[[argparse.Namespace], "int | None"]


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are one line each, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and where help is; exits with status 2."""
        end = "" if message.endswith("?") else "."
        print(f"{self.prog}: error: {message}{end} See {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def parse_whole(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parsed arguments of a program of its own; refuses what it does not know."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            self.refuse(unknown)
        return options

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """The error for arguments that the parser does not know: names the first option, or the first word."""
        option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if option is None:
            self.error(f"unexpected argument {unknown[0]!r}")
        known = [name for action in self._actions for name in action.option_strings]
        self.error(f"no option {option}{nearest(option, known)}")

    def with_flag(self, message: str) -> str:
        """An error "num_pages is ..." about a keyword, in the words of the command line: "--num-pages is ..."."""
        name, found, rest = message.partition(" is ")
        flag = next(
            (action.option_strings[-1] for action in self._actions if action.dest == name and action.option_strings),
            None,
        )
        return message if not found or flag is None else f"{flag} is {rest.removesuffix(', or None')}"


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean --port?" for the known word that resembles `word` most; "" if none does."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def add_command(commands: Any, name: str, handler: Handler, text: str, examples: str, **options: Any) -> CommandParser:
    """Declares a command: its line in the list, its help with examples, its handler."""
    parser: CommandParser = commands.add_parser(
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
    text = "model folder, or owner/name[@revision] of the Hugging Face Hub (default: nano, the embedded one)"
    parser.add_argument(flag, metavar="MODEL", help=text, **nargs)


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=_temperature, default=None, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same text")


def effort(text: str) -> str | int:
    """A level of reasoning, a budget, or a range of budgets."""
    from dsv4.post_training.effort_names import read_effort

    try:
        return read_effort(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _temperature(text: str) -> float:
    """A temperature in the API's range."""
    if not 0 <= (value := real(text)) <= 2:
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed: [0, 2]")
    return value


def add_flags(parser: argparse.ArgumentParser, config: type, command: str) -> dict[str | None, Any]:
    """Adds a flag for each option of a config class that lists the command; returns the groups. See `pick_flags`."""
    groups: dict[str | None, Any] = {None: parser}
    for known in options_of(config):
        if command in known.commands:
            if known.group not in groups:
                made = (group for group in parser._action_groups if group.title == known.group)
                groups[known.group] = next(made, None) or parser.add_argument_group(known.group)
            flag = known.flag or f"--{known.name.replace('_', '-')}"
            groups[known.group].add_argument(flag, dest=known.name, help=known.help, **_flag_details(known))
    return groups


def _flag_details(known: Option) -> dict[str, Any]:
    """argparse keywords of one option: a switch, a repeatable flag, or a flag with a value."""
    if known.type_names[0] == "bool":
        return {"action": "store_false" if known.default else "store_true"}
    if known.type_names[0].startswith("Sequence"):
        return {"action": "append", "default": list(known.default), "metavar": known.metavar}
    details: dict[str, Any] = {"default": known.default, "metavar": known.metavar}
    if known.bare is not None:
        details |= {"nargs": "?", "const": known.bare}
    if known.choices:
        return details | {"choices": known.choices}
    if known.unit == "bytes":
        if known.default is not None:
            details["default"] = format_size(known.default)  # as the help shows it; argparse converts a text
        return details | {"type": size}
    return details | {"type": {"int": int, "float": float}.get(known.type_names[0], str)}


def size(text: str) -> int:
    """Bytes of a flag's value; the name and the error are argparse's."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def number(text: str, least: int = 0) -> int:
    """A whole number of a flag's value; the name and the error are argparse's."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, {least} or more")
    return int(text)


def count(text: str) -> int:
    """A whole number above 0 of a flag's value."""
    return number(text, 1)


def real(text: str) -> float:
    """A number of a flag's value; NaN, which is in no range, for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def seconds(text: str) -> float:
    """A time above 0 of a flag's value."""
    if not 0.0 < (value := real(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: seconds, above 0")
    return value


def pick_flags(options: argparse.Namespace, *configs: type) -> dict[str, Any]:
    """Parsed values of the flags that `add_flags` made, by option name."""
    names = [known.name for config in configs for known in options_of(config)]
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
