"""`dsv4 migrate`: find in a code base what V4's API changes for programs written for V3, and what V4 would cost."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "migrate",
        run,
        "propose the changes that programs for DeepSeek's V3 API need for V4, and recalculate costs of past usage",
        "dsv4 migrate src app.env\ndsv4 migrate src --write\ndsv4 migrate src --to deepseek-v4-pro\n"
        "dsv4 migrate src --base-url http://127.0.0.1:8000\ndsv4 migrate --usage usage_data.zip",
    )
    parser.epilog = (parser.epilog or "") + (
        "\n\nexit status: 0 nothing to change, or changed with --write; 1 changes are proposed; 2 an error.\n"
        "Read are Python, JavaScript, TypeScript, Go, Java, JSON, YAML, TOML, .env and shell files, and notebooks,\n"
        "that git does not ignore, of 2 MiB at most."
    )
    parser.add_argument("places", metavar="FILE_OR_FOLDER", nargs="*", help="sources to look through")
    parser.add_argument("--write", action="store_true", help="change the files; each is replaced whole or not at all")
    parser.add_argument(
        "--to",
        choices=("deepseek-flash", "deepseek-v4-flash", "deepseek-v4-pro"),
        default="deepseek-flash",
        help="the model in place of V3's (default: %(default)s)",
    )
    parser.add_argument("--base-url", metavar="URL", help="a server of your own in place of https://api.deepseek.com")
    parser.add_argument(
        "--usage",
        metavar="FILE",
        action="append",
        default=[],
        help="a usage export whose cost to recalculate; repeatable: DeepSeek's ZIP file or amount-*.csv, "
        "dsv4 usage --by request --csv, or JSONL of answers",
    )


def run(options: argparse.Namespace) -> int:
    from dsv4.commands.terminal.migrate import migrate, print_costs

    if not options.places and not options.usage:
        raise ValueError("give files or folders to look through, or --usage FILE")
    if options.write and not options.places:
        raise ValueError("--write needs files or folders to change")
    status = migrate(options.places, options.to, options.base_url, options.write) if options.places else 0
    if options.usage:
        print_costs(options.usage, options.to)
    return status
