"""A trained model as a model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from dsv4.checkpoint import convert, save_model, save_tensors, stored_format
from dsv4.checkpoint.adapter_files import Pair
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.lora import save_adapter
from dsv4.training.lora_settings import LoraSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # copied to an export


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copy the tokenizer's files of a model to `folder`; others, such as results, tell of the model before training."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def check_output(out: Path, run_dir: Path, start: Path | None = None) -> None:
    """OSError or ValueError, before a run and not at its end, if its model folder could not be written to `out`.

    An export replaces `out`, so that must not hold anything but a model, nor the run itself. `start`: a model folder
    that the export reads.
    """
    place, run = out.resolve(), run_dir.resolve()
    if os.path.ismount(place):
        raise ValueError(f"--out: {out} is a mount point, which a model cannot replace; give a folder within it")
    folder = next(parent for parent in place.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "no right to write in" if folder.is_dir() else "no folder:"
        raise OSError(f"the model folder {out} cannot be written: {why} {folder}; give another --out")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} holds something else than a model; give a new, an empty or a model folder")
    if run.is_relative_to(place):
        raise ValueError(f"--out: {out} holds the run's folder {run_dir}, which the model would replace; give another")
    if start is not None and place == start.resolve():
        raise ValueError(f"--out: {out} is the model that the adapter is for; give another folder")


def export_model(model: Transformer, tokenizer_folder: Path, out: Path) -> None:
    """Write the model in the official FP4/FP8 layout and the tokenizer's files to `out`, all or nothing.

    A model that stands there is replaced; CheckpointError if it is something else.
    """
    save_model(model, model.config, out, overwrite=True, extras=sorted(tokenizer_folder.iterdir()))


def export_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, tokenizer_folder: Path, out: Path
) -> None:
    """As export_model, of a model whose tensors come one at a time, as save_tensors takes them."""
    save_tensors(tensors, config, out, overwrite=True, extras=sorted(tokenizer_folder.iterdir()))


def export_adapter(pairs: Mapping[str, Pair], settings: LoraSettings, start: Path, adapter: Path, out: Path) -> None:
    """Write adapters, by name of the matrix, to the folder `adapter`; the folder `start` with them merged in to `out`.

    `out` has the formats of `start`, and whatever lies in it besides the weights.
    """
    save_adapter(pairs, settings, str(start), adapter)
    convert(start, out, format=stored_format(start), overwrite=True, adapter=adapter)
