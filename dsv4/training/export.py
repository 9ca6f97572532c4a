"""A trained model as a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from dsv4.checkpoint import convert, save_model, save_tensors, stored_format
from dsv4.checkpoint.adapter_files import Pair
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.lora import save_adapter
from dsv4.training.lora_settings import LoraSettings


def export_model(model: Transformer, tokenizer_folder: Path, out: Path) -> None:
    """Write the model in the official FP4/FP8 layout and the tokenizer's files to `out`, all or nothing."""
    _export(lambda folder: save_model(model, model.config, folder), tokenizer_folder, out)


def export_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, tokenizer_folder: Path, out: Path
) -> None:
    """As export_model, of a model whose tensors come one at a time, as save_tensors takes them."""
    _export(lambda folder: save_tensors(tensors, config, folder), tokenizer_folder, out)


def _export(save: Callable[[Path], None], tokenizer_folder: Path, out: Path) -> None:
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(unfinished)
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
