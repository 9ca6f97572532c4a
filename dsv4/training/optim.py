"""Muon and AdamW in one optimizer, split and set as DeepSeek V4 trains (report, Muon and Training Setups).

AdamW: embedding, head, every RMSNorm weight, the static biases and gates of mHC (`hc_*_base`, `hc_*_scale`) and,
without weight decay, the remaining vectors (`attn_sink`). The router's `gate.bias` belongs to neither: it moves by rule
(balance.py). Everything else is Muon, `ape` included: the report names no exception for it. Not split: the two window
series in a CSA compressor's `wkv` and `wgate`, whose rows feed one softmax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dsv4.training.newton_schulz import CHUNK_ELEMENTS, orthogonalize

Kind = Literal["muon", "adamw", "adamw_no_decay", "by_rule"]


class SplitConfig(Protocol):
    """What the split needs of a ModelConfig."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def o_groups(self) -> int: ...
    @property
    def index_n_heads(self) -> int: ...
    @property
    def hc_mult(self) -> int: ...


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is trained; `rows` are the heights of the independent matrices stacked in a Muon parameter."""

    name: str
    kind: Kind
    rows: tuple[int, ...] = ()


def parameter_rule(name: str, shape: tuple[int, ...], config: SplitConfig) -> ParameterRule:
    """Rule of the parameter `name` of `shape`. Fused tensors name their logically independent matrices as `rows`."""
    if name.endswith("gate.bias"):
        return ParameterRule(name, "by_rule")
    if name in ("embed.weight", "head.weight"):
        return ParameterRule(name, "adamw")
    if name.endswith("norm.weight") or re.search(r"(^|\.)hc_\w+_(base|scale)$", name):
        return ParameterRule(name, "adamw")
    if len(shape) < 2:
        return ParameterRule(name, "adamw_no_decay")
    if len(shape) != 2:
        raise ValueError(f"parameter {name!r} has shape {shape}; the optimizer knows vectors and matrices only")
    return ParameterRule(name, "muon", _independent_rows(name, shape, config))


def _independent_rows(name: str, shape: tuple[int, ...], config: SplitConfig) -> tuple[int, ...]:
    height = shape[0]
    parts = 1
    if name.endswith("indexer.wq_b.weight"):
        parts = config.index_n_heads
    elif name.endswith("wq_b.weight"):
        parts = config.num_attention_heads
    elif name.endswith("wo_a.weight"):
        parts = config.o_groups
    elif re.search(r"(^|\.)hc_(attn|ffn)_fn$", name):
        hc = config.hc_mult  # pre, post and residual maps are three matrices in the paper
        return (hc, hc, hc * hc)
    if height % parts:
        raise ValueError(f"parameter {name!r} has {height} rows, which do not divide into {parts} independent matrices")
    return (height // parts,) * parts


def split_parameters(named: Iterable[tuple[str, nn.Parameter]], config: SplitConfig) -> list[ParameterRule]:
    """One rule for each trainable parameter and for each router bias, in the order given."""
    return [
        parameter_rule(name, tuple(parameter.shape), config)
        for name, parameter in named
        if parameter.requires_grad or name.endswith("gate.bias")
    ]


@dataclass
class _MuonGroup:
    """Some matrices of one shape: (parameter name, first row, last row) each, and their momenta stacked [N, n, m].

    Few enough that one group's step stays in cache, from gradient to weight.
    """

    shape: tuple[int, int]
    members: list[tuple[str, int, int]] = field(default_factory=list)
    momentum: Tensor = field(default_factory=lambda: torch.empty(0))


class MuonAdamW:
    """Steps every trainable parameter of a model once: Muon for matrices, AdamW for the rest, one learning rate.

    Muon: M <- mu M + G; O = HybridNS(mu M + G) * sqrt(max(n, m)) * gamma; W <- W (1 - lr wd) - lr O.
    Matrices of one shape are stacked, so that hundreds of experts cost a few batched products.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SplitConfig,
        *,
        momentum: float = 0.95,
        gamma: float = 0.18,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.momentum, self.gamma, self.weight_decay, self.compute_dtype = momentum, gamma, weight_decay, compute_dtype
        # What a helper process builds its own copy with.
        self.settings: dict[str, Any] = {
            "momentum": momentum,
            "gamma": gamma,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "compute_dtype": compute_dtype,
        }
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rules = split_parameters(model.named_parameters(), config)
        self._groups = self._stack_groups()
        decayed = [self.parameters[rule.name] for rule in self.rules if rule.kind == "adamw"]
        plain = [self.parameters[rule.name] for rule in self.rules if rule.kind == "adamw_no_decay"]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, foreach=True
        )

    def _stack_groups(self) -> list[_MuonGroup]:
        by_shape: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for rule in self.rules:
            if rule.kind != "muon":
                continue
            width, start = self.parameters[rule.name].shape[1], 0
            for rows in rule.rows:
                by_shape.setdefault((rows, width), []).append((rule.name, start, start + rows))
                start += rows
        groups: list[_MuonGroup] = []
        for (rows, width), members in by_shape.items():
            size = max(1, CHUNK_ELEMENTS // (rows * width))
            for first in range(0, len(members), size):
                some = members[first : first + size]
                device = self.parameters[some[0][0]].device
                groups.append(_MuonGroup((rows, width), some, torch.zeros(len(some), rows, width, device=device)))
        # The costliest first, so that dealing them out in turn loads the workers evenly.
        return sorted(groups, key=lambda group: -len(group.members) * group.shape[0] * group.shape[1])

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0, worker: int = 0, workers: int = 1) -> None:
        """Apply one update at learning rate `lr`; gradients count times `grad_scale` (clipping without another pass).

        A parameter without gradient counts as one whose gradient is zero. Of several workers that share the weights,
        the gradients and the momenta, each steps its part: the Muon groups in turn, AdamW's the first worker.
        """
        for group in self._groups[worker::workers]:
            weights = [self.parameters[name].detach()[start:stop] for name, start, stop in group.members]
            gradient = torch.stack([self._gradient(name)[start:stop] for name, start, stop in group.members])
            if grad_scale != 1.0:
                gradient.mul_(grad_scale)
            group.momentum.mul_(self.momentum).add_(gradient)
            gradient.add_(group.momentum, alpha=self.momentum)
            update = orthogonalize(gradient, self.compute_dtype)
            scale = -lr * self.gamma * max(group.shape) ** 0.5
            for weight, direction in zip(weights, update.unbind(), strict=True):
                weight.mul_(1.0 - lr * self.weight_decay).add_(direction, alpha=scale)
        if worker:
            return
        for group in self._adamw.param_groups:
            group["lr"] = lr
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                elif grad_scale != 1.0:
                    parameter.grad.mul_(grad_scale)
        self._adamw.step()

    def _gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together, before any scaling."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def not_finite(self) -> list[str]:
        """Parameters whose gradient is not finite, by name; the first few."""
        named = ((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)
        return [f"gradient of {name}" for name, grad in named if not bool(grad.isfinite().all())][:5]

    def momenta(self) -> list[Tensor]:
        """Muon's momenta, the tensors themselves."""
        return [group.momentum for group in self._groups]

    def share_momenta(self, momenta: Sequence[Tensor]) -> None:
        """Keep the momenta in `momenta`, as another optimizer's `momenta()` lists them."""
        for group, momentum in zip(self._groups, momenta, strict=True):
            group.momentum = momentum

    def _check_adamw(self, state: Mapping[str, Any]) -> None:
        """ValueError where AdamW's moments have other shapes than its parameters: it would take them all the same."""
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        if sum(len(group["params"]) for group in state["param_groups"]) != len(parameters):
            raise ValueError(f"AdamW's state is not of {len(parameters)} parameters, as this model's")
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for number, moments in state["state"].items():
            parameter = parameters[number]
            for kind in ("exp_avg", "exp_avg_sq"):
                if moments[kind].shape != parameter.shape or moments[kind].dtype != parameter.dtype:
                    raise ValueError(
                        f"AdamW's {kind} of {names[id(parameter)]} is {moments[kind].dtype} "
                        f"{tuple(moments[kind].shape)}, its parameter {parameter.dtype} {tuple(parameter.shape)}"
                    )

    def state_dict(self) -> dict[str, Any]:
        """Momenta and AdamW moments; tensors are not copied."""
        return {
            "muon": [{"members": list(group.members), "momentum": group.momentum} for group in self._groups],
            "adamw": self._adamw.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; ValueError, and nothing is changed, where it is of a model with other parameters."""
        saved = state["muon"]
        if [entry["members"] for entry in saved] != [list(group.members) for group in self._groups]:
            raise ValueError("optimizer state is of a model with other matrices than this one")
        self._check_adamw(state["adamw"])
        for group, entry in zip(self._groups, saved, strict=True):
            group.momentum.copy_(entry["momentum"])
        self._adamw.load_state_dict(state["adamw"])
