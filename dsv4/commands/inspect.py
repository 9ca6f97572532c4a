"""`dsv4 inspect`: count parameters, tensors, bytes, KV cache and FLOPs from a config."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dsv4.commands.options import add_command
from dsv4.config import ModelConfig
from dsv4.presets import PRESETS


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        run,
        "count a model's parameters, tensors, bytes, KV cache and FLOPs from its config alone",
        "dsv4 inspect flash\ndsv4 inspect path/to/model --json",
    )
    presets = ", ".join(PRESETS)
    parser.add_argument("model", metavar="MODEL_OR_PRESET", help=f"a folder with a config.json, or one of {presets}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def _plain_layout(path: Path) -> Any:
    """Storage layout of an unquantized folder; None for a quantized one."""
    raw = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    if raw.get("quantization_config") is not None:
        return None
    return "fp32" if raw.get("dtype", raw.get("torch_dtype")) == "float32" else "bf16"


def run(options: argparse.Namespace) -> None:
    from dsv4.analysis import StorageLayout, summary

    name: str = options.model
    layout: StorageLayout | None = None
    if name in PRESETS and not Path(name).is_dir():
        config = ModelConfig.preset(name)
    else:
        if not Path(name).exists():
            raise ValueError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a model folder")
        config = ModelConfig.from_pretrained(name)
        layout = _plain_layout(Path(name))
    report = summary(config, layout)
    if options.json:
        print(json.dumps({"model": name, **report, "config": config.to_dict()}, indent=2))
    else:
        from dsv4.analysis.table import print_summary

        print_summary(name, config, report)
