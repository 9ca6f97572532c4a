"""Auxiliary-loss-free load balancing by rule, not by gradient; figures on experts for the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_router_biases(model: nn.Module, loads: Mapping[str, Tensor], speed: float) -> None:
    """Update the selection biases of each score-routed MoE: b_e <- b_e + speed * sign(mean load - load_e).

    `loads` maps the MoE's module name ("layers.3.ffn") to the number of tokens per expert [E] in the step. Those of
    MoEs that other stages of a pipeline have are left out.
    """
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".gate.bias")}
    for module_name, load in loads.items():
        bias = biases.get(f"{module_name}.gate.bias")
        if bias is None:
            continue
        counts = load.to(bias.device, torch.float32)
        bias += speed * torch.sign(counts.mean() - counts)


def load_imbalance(loads: Mapping[str, Tensor]) -> float:
    """Maximum over the layers of busiest expert's load / mean load; 1 is perfect balance, 0 without loads."""
    ratios = [float(load.max() / load.float().mean().clamp_min(1.0)) for load in loads.values()]
    return max(ratios, default=0.0)


def clamped_shares(clamps: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the gates and ups of each MoE that the SwiGLU clamp changed, from counts as in AuxLosses.clamps."""
    shares: dict[str, float] = {}
    for name, counts in clamps.items():
        gates, ups, values = counts.tolist()
        shares[name] = (gates + ups) / max(1, values)
    return shares
