"""Router bias rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsv4.training.balance import load_imbalance, update_router_biases


def model_with_gate() -> nn.Module:
    model, layer, ffn, gate = nn.Module(), nn.Module(), nn.Module(), nn.Module()
    gate.bias = nn.Parameter(torch.tensor([0.5, 0.0, -0.5, 1.0]), requires_grad=False)
    ffn.gate = gate
    layer.ffn = ffn
    model.layers = nn.ModuleList([layer])
    return model


def test_busy_experts_fall_idle_ones_rise_and_average_ones_stay() -> None:
    model = model_with_gate()
    update_router_biases(model, {"layers.0.ffn": torch.tensor([9, 0, 5, 6])}, speed=0.01)
    torch.testing.assert_close(
        model.get_parameter("layers.0.ffn.gate.bias").data, torch.tensor([0.49, 0.01, -0.5, 0.99])
    )


def test_imbalance_is_busiest_over_mean() -> None:
    assert load_imbalance({"a": torch.tensor([2, 2]), "b": torch.tensor([6, 2])}) == pytest.approx(1.5)
    assert load_imbalance({}) == 0.0
