"""`dsv4 data`: tokenize text for training, look into the result, write solved problems."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4.commands.options import add_command, count, effort

LEVELS = ("standard", "easy")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        run,
        "tokenize text for training, check the result, write solved problems to fine-tune on",
        "dsv4 data tokenize texts/ --out shards\n"
        "dsv4 data tokenize 'web/*.parquet' chats.jsonl --model deepseek-ai/DeepSeek-V4-Flash --out shards\n"
        "dsv4 data inspect shards\n"
        "dsv4 data solutions code --count 2000 --out code.jsonl",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    tokenize = actions.add_parser("tokenize", help="text, JSONL and Parquet to shards", description=_TOKENIZE)
    tokenize.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="file, folder, glob, or hf:NAME[@REVISION][:SPLIT]"
    )
    tokenize.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the shards")
    tokenize.add_argument(
        "--model", metavar="MODEL", help="model folder whose tokenizer is used (default: the embedded nano model)"
    )
    tokenize.add_argument(
        "--column",
        metavar="NAME",
        help="column or key of the text, or messages (default: text, or messages without it)",
    )
    tokenize.add_argument(
        "--shard-tokens", type=int, default=1 << 24, metavar="N", help="tokens per shard (default: %(default)s)"
    )
    inspect = actions.add_parser("inspect", help="check every shard and print the counts")
    inspect.add_argument("folder", type=Path, help="folder of shards")
    solutions = actions.add_parser("solutions", help="solved problems of a domain as JSONL", description=_SOLUTIONS)
    solutions.add_argument("domain", metavar="DOMAIN", help="mathematics, code, instructions, tools or terminal")
    solutions.add_argument("--count", type=count, default=1000, metavar="N", help="default: %(default)s")
    solutions.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file of conversations")
    solutions.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    thinking = "with or without thinking (default: as the domain's problems have it)"
    solutions.add_argument("--thinking", action=argparse.BooleanOptionalAction, help=thinking)
    efforts = "efforts of the conversations with thinking, whose reasoning then has several lengths: "
    efforts += "low, high, max, budgets of 1 to 100, or 1-100"
    solutions.add_argument("--efforts", nargs="+", type=effort, default=[], metavar="EFFORT", help=efforts)
    level = "easy: what a model of some ten million parameters can learn (default: %(default)s)"
    solutions.add_argument("--level", choices=LEVELS, default=LEVELS[0], help=level)
    for action in (tokenize, inspect, solutions):
        action.set_defaults(parser=action)


_TOKENIZE = """Tokenize text, JSONL and Parquet files, or a Hugging Face dataset, into memory-mapped shards. A record is
a text, or a conversation: an object with "messages" whose last one is the assistant's. A killed call goes on where it
was when it is called again."""

_SOLUTIONS = """Write solved problems of a domain's training split as conversations in OpenAI's message format, a line
each, for `dsv4 train sft`. Results of tool calls come from the domain's tools."""


def run(options: argparse.Namespace) -> None:
    if options.action == "solutions":
        from dsv4.commands.terminal.solutions import write_solutions

        write_solutions(
            options.domain,
            options.out,
            count=options.count,
            seed=options.seed,
            thinking=options.thinking,
            efforts=options.efforts,
            level=options.level,
        )
        return
    from dsv4.commands.terminal import data

    if options.action == "tokenize":
        data.tokenize(options.sources, options.model, options.out, options.column, options.shard_tokens)
    else:
        data.inspect(options.folder)
