"""`dsv4 inspect`: count parameters, tensors, bytes, KV cache and FLOPs from a config, and tensors from headers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.commands.options import add_command, add_flags
from dsv4.config import ModelConfig
from dsv4.engine.config import EngineConfig
from dsv4.hub import fetch_headers, fetch_settings, hub_name
from dsv4.presets import PRESETS
from dsv4.safetensors_headers import count_stored, read_headers

if TYPE_CHECKING:
    from dsv4.analysis import StorageLayout


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        run,
        "count a model's parameters, tensors, bytes, KV cache and FLOPs from its config and the headers of its files",
        "dsv4 inspect flash\ndsv4 inspect deepseek-ai/DeepSeek-V4-Flash\ndsv4 inspect path/to/model --json",
    )
    text = f"a folder with a config.json, owner/name[@revision] of the Hugging Face Hub, or one of {', '.join(PRESETS)}"
    parser.add_argument("model", metavar="MODEL_OR_PRESET", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    add_flags(parser, EngineConfig, "inspect")


def run(options: argparse.Namespace) -> None:
    from dsv4.analysis import summary

    name: str = options.model
    if name in PRESETS and not Path(name).is_dir() and options.revision is None:
        config = ModelConfig.preset(name)
        report = summary(config)
    else:
        config, layout, stored = _look_into(name, options.revision)
        report = summary(config, layout)
        if stored is not None:
            report["stored"] = stored
    if options.json:
        print(json.dumps({"model": name, **report, "config": config.to_dict()}, indent=2))
    else:
        from dsv4.commands.terminal.inspect import print_summary

        print_summary(name, config, report)


def _look_into(model: str, revision: str | None) -> tuple[ModelConfig, StorageLayout | None, dict[str, Any] | None]:
    """Config, storage layout and stored tensors (None without weights) of a folder, a config.json or a name."""
    name = hub_name(model, revision)
    place = Path(model) if name is None else fetch_settings(name)
    if not place.exists():
        allowed = f"a preset ({', '.join(PRESETS)}) nor a model folder, nor owner/name of the Hugging Face Hub"
        raise ValueError(f"{model!r} is neither {allowed}")
    config = ModelConfig.from_pretrained(place)
    if place.is_file():
        return config, _plain_layout(place), None
    headers = read_headers(place) if name is None else fetch_headers(name, place)
    return config, _plain_layout(place / "config.json"), count_stored(headers.values()) if headers else None


def _plain_layout(file: Path) -> StorageLayout | None:
    """Storage layout of an unquantized model; None for a quantized one."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    if raw.get("quantization_config") is not None:
        return None
    return "fp32" if raw.get("dtype", raw.get("torch_dtype")) == "float32" else "bf16"
