"""`dsv4 convert`: rewrite a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command, add_flags
from dsv4.engine.config import EngineConfig


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        "rewrite a checkpoint in another layout, tensor by tensor",
        "dsv4 convert path/to/model out --format official-base\ndsv4 convert path/to/model out --format transformers\n"
        "dsv4 convert deepseek-ai/DeepSeek-V4-Flash flash.gguf --format gguf\n"
        "dsv4 convert path/to/model model.gguf --format gguf\n"
        "dsv4 convert path/to/base merged --format official --adapter runs/lora/adapter",
    )
    parser.add_argument("src", metavar="SRC", help="model folder, or owner/name[@revision] of the Hugging Face Hub")
    parser.add_argument("dst", metavar="DST", help="folder to create; for gguf, a file")
    formats = ("official", "official-base", "bf16", "fp32", "transformers", "gguf")
    parser.add_argument("--format", choices=formats, required=True, help="layout to write; gguf is for llama.cpp")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    parser.add_argument(
        "--allow-rounding", action="store_true", help="write a layout that cannot hold all values, and print the error"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter (PEFT's files) to merge into the weights")
    parser.add_argument(
        "--linears", choices=("bf16", "q8_0"), help="gguf: type of FP8 matrices (default: an exact one)"
    )
    parser.add_argument("--mtp", action="store_true", help="gguf: write the MTP block alone, llama.cpp's draft model")
    add_flags(parser, EngineConfig, "convert")


def run(options: argparse.Namespace) -> None:
    from dsv4.commands.terminal.convert import convert_checkpoint
    from dsv4.model_folder import resolve_model

    convert_checkpoint(
        resolve_model(options.src, options.revision),
        options.dst,
        options.format,
        overwrite=options.overwrite,
        allow_rounding=options.allow_rounding,
        linears=options.linears,
        mtp=options.mtp,
        adapter=options.adapter,
    )
