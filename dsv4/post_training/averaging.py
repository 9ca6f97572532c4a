"""Average of several models' weights: a baseline of distillation, and a start for further training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4.checkpoint import load_model
from dsv4.model.transformer import Transformer


@torch.no_grad()
def average_models(folders: Sequence[Path], weights: Sequence[float] | None = None) -> Transformer:
    """Model whose parameters are the weighted mean of those of `folders`, one of which is in memory at a time.

    Hash tables are the first model's. ValueError unless the models have one config, and weights are positive.
    """
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if not folders or len(weights) != len(folders) or not all(weight > 0.0 for weight in weights):
        raise ValueError(f"weights {weights} for {len(folders)} models; allowed: one above 0 for each, one or more")
    average = load_model(folders[0], weights="widened").requires_grad_()
    sums: dict[str, Tensor] = {name: p.detach().double() * weights[0] for name, p in average.named_parameters()}
    for folder, weight in zip(folders[1:], weights[1:], strict=True):
        model = load_model(folder, weights="widened")
        if model.config != average.config:
            raise ValueError(f"{folder} has another config than {folders[0]}; allowed: models of one shape")
        for name, parameter in model.named_parameters():
            sums[name] += parameter.double() * weight
    total = sum(weights)
    for name, parameter in average.named_parameters():
        parameter.copy_(sums[name] / total)
    return average
