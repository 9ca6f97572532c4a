"""A trained model as a model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from dsv4.checkpoint import convert, save_model, save_tensors, stored_format
from dsv4.checkpoint.adapter_files import Pair
from dsv4.checkpoint.atomic import new_folder
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.lora import save_adapter
from dsv4.training.lora_settings import LoraSettings


def check_target(out: Path, run_dir: Path) -> None:
    """Refuse the model folder `out` of a run in `run_dir` before hours of training: exporting replaces it whole.

    ValueError if it is neither new, empty nor a model folder, or holds the run itself; OSError without the right to
    write there.
    """
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} holds something else than a model; give a new, an empty or a model folder")
    if run_dir.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out: {out} holds the run in {run_dir}, which it would replace; give another folder")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise OSError(f"the model folder {out} cannot be written: no right to write in {folder}; give another --out")


def export_model(model: Transformer, tokenizer_folder: Path, out: Path) -> None:
    """Write the model in the official FP4/FP8 layout and the tokenizer's files to `out`, all or nothing.

    CheckpointError if `out` holds something else than a model.
    """
    _export(lambda folder: save_model(model, model.config, folder), tokenizer_folder, out)


def export_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, tokenizer_folder: Path, out: Path
) -> None:
    """As export_model, of a model whose tensors come one at a time, as save_tensors takes them."""
    _export(lambda folder: save_tensors(tensors, config, folder), tokenizer_folder, out)


def _export(save: Callable[[Path], None], tokenizer_folder: Path, out: Path) -> None:
    with new_folder(out, overwrite=True) as unfinished:
        save(saved := unfinished / "saved")
        for path in saved.iterdir():
            path.rename(unfinished / path.name)
        saved.rmdir()
        for path in sorted(tokenizer_folder.iterdir()):
            shutil.copy2(path, unfinished / path.name)


def export_adapter(pairs: Mapping[str, Pair], settings: LoraSettings, start: Path, adapter: Path, out: Path) -> None:
    """Write adapters, by name of the matrix, to the folder `adapter`; the folder `start` with them merged in to `out`.

    `out` has the formats of `start`, and whatever lies in it besides the weights.
    """
    save_adapter(pairs, settings, str(start), adapter)
    convert(start, out, format=stored_format(start), overwrite=True, adapter=adapter)
