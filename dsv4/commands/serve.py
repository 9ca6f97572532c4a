"""`dsv4 serve`: serve a model."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command, add_flags, pick_flags
from dsv4.engine.config import EngineConfig
from dsv4.server.config import ACCESS, ServerConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        "serve a chat page and the OpenAI and Anthropic APIs",
        "dsv4 serve\ndsv4 serve deepseek-ai/DeepSeek-V4-Flash\n"
        "dsv4 serve path/to/DeepSeek-V4-Flash path/to/DeepSeek-V4-Pro\n"
        "dsv4 serve path/to/model --port 9000 --api-key sk-one --api-key sk-two",
        usage="%(prog)s [options] [MODEL ...]",
    )
    text = "model folder, or owner/name[@revision] of the Hugging Face Hub; each has its name (default: "
    parser.add_argument("model", metavar="MODEL", nargs="*", help=text + "nano, the embedded one)")
    groups = add_flags(parser, ServerConfig, "serve")
    add_flags(parser, EngineConfig, "serve")
    groups[ACCESS].add_argument(
        "--api-key-file", metavar="FILE", help="require one of the keys in FILE, one per line, # comments"
    )


def run(options: argparse.Namespace) -> int | None:
    from dsv4.server.keys import collect_keys
    from dsv4.server.run import serve

    options.api_keys = collect_keys(options.api_keys, options.api_key_file)
    model = options.model if len(options.model) > 1 else next(iter(options.model), None)
    return serve(model, **pick_flags(options, ServerConfig, EngineConfig))
