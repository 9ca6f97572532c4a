"""Averages of models: of equal ones the model itself, of others the mean; wrong input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.checkpoint import save_model
from dsv4.config import nano_path
from dsv4.post_training.averaging import average_models

from .small_policy import small_policy


def test_the_average_is_the_weighted_mean(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.25)):
        model = small_policy()[0].model
        with torch.no_grad():
            model.head.weight.fill_(0.5 + shift)
        save_model(model, model.config, tmp_path / name, format="official")
    found = average_models([tmp_path / "a", tmp_path / "b"], [3.0, 1.0])
    assert torch.equal(found.head.weight, torch.full_like(found.head.weight, 0.5625))
    same = average_models([tmp_path / "a"] * 3)
    want = dict(dsv4.load(tmp_path / "a", weights="widened").named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in same.named_parameters())
    with pytest.raises(ValueError, match="has another config than"):
        average_models([tmp_path / "a", nano_path()])
    with pytest.raises(ValueError, match=r"weights \[1.0\] for 2 models"):
        average_models([tmp_path / "a", tmp_path / "b"], [1.0])
