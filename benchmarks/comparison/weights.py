"""The weights that all contenders load: one random draw, as an official-names folder and as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.comparison.plan import FOLDERS
from dsv4.checkpoint import convert, save_model
from dsv4.checkpoint.writing import Format
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer


@torch.no_grad()
def write_weights(config: ModelConfig, scratch: Path, seed: int, layout: Format = "fp32") -> None:
    """Folders under `scratch`, replaced. No parameter is zero or one, so that each of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    model.init_weights(generator)  # for the hash tables, which deal the experts out evenly
    for name, p in model.named_parameters():
        p.normal_(std=0.3 if p.dim() == 1 else p.shape[-1] ** -0.5, generator=generator)
        if name.endswith("norm.weight"):
            p.add_(1.0)
    save_model(model, config, scratch / FOLDERS["dsv4"], layout, overwrite=True)
    convert(scratch / FOLDERS["dsv4"], scratch / FOLDERS["transformers"], "transformers", overwrite=True)
