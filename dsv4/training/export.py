"""A trained model as a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from dsv4.checkpoint import convert, save_model, stored_format
from dsv4.checkpoint.adapter_files import Pair
from dsv4.model.transformer import Transformer
from dsv4.training.lora import save_adapter
from dsv4.training.lora_settings import LoraSettings


def export_model(model: Transformer, tokenizer_folder: Path, out: Path) -> None:
    """Write the model in the official FP4/FP8 layout and the tokenizer's files to `out`, all or nothing."""
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, model.config, unfinished, format="official")
    for path in sorted(tokenizer_folder.iterdir()):
        shutil.copy2(path, unfinished / path.name)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


def export_adapter(pairs: Mapping[str, Pair], settings: LoraSettings, start: Path, adapter: Path, out: Path) -> None:
    """Write adapters, by name of the matrix, to the folder `adapter`; the folder `start` with them merged in to `out`.

    `out` has the formats of `start`, and whatever lies in it besides the weights.
    """
    save_adapter(pairs, settings, str(start), adapter)
    convert(start, out, format=stored_format(start), overwrite=True, adapter=adapter)
