"""A trained model as a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from dsv4.checkpoint import save_model
from dsv4.model.transformer import Transformer


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
