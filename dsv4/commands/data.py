"""`dsv4 data`: tokenize text for training, look into the result."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4.commands.options import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "data",
        run,
        "tokenize text for training, and check the result",
        "dsv4 data tokenize texts/ --out shards\n"
        "dsv4 data tokenize 'web/*.parquet' chats.jsonl --model deepseek-ai/DeepSeek-V4-Flash --out shards\n"
        "dsv4 data inspect shards",
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
        "--column", default="text", metavar="NAME", help="column or key of the text (default: %(default)s)"
    )
    tokenize.add_argument(
        "--shard-tokens", type=int, default=1 << 24, metavar="N", help="tokens per shard (default: %(default)s)"
    )
    inspect = actions.add_parser("inspect", help="check every shard and print the counts")
    inspect.add_argument("folder", type=Path, help="folder of shards")
    for action in (tokenize, inspect):
        action.set_defaults(parser=action)


_TOKENIZE = """Tokenize text, JSONL and Parquet files, or a Hugging Face dataset, into memory-mapped shards. A record is
a text, or a conversation: an object with "messages" whose last one is the assistant's. A killed call goes on where it
was when it is called again."""


def run(options: argparse.Namespace) -> None:
    from dsv4.commands.terminal import data

    if options.action == "tokenize":
        data.tokenize(options.sources, options.model, options.out, options.column, options.shard_tokens)
    else:
        data.inspect(options.folder)
