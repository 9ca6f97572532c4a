"""Muon and AdamW in one optimizer, with DeepSeek V4's split and settings (report, Muon and Training Setups).

model/parameters.py lists each parameter's optimizer and the independent matrices that it holds. The router's
`gate.bias` has neither: balance.py updates it by rule.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv4.model.lora import is_adapter
from dsv4.model.parameters import Optimizer, SplitSizes, matrix_heights, row_of
from dsv4.model.stacks import official_tensors
from dsv4.training.attention_phase import AttentionPhase, trains
from dsv4.training.newton_schulz import CHUNK_ELEMENTS, orthogonalize


@dataclass(frozen=True)
class ParameterRule:
    """Optimizer of one parameter; `rows` are the heights of the independent matrices stacked in a Muon parameter."""

    name: str
    kind: Optimizer
    rows: tuple[int, ...] = ()


def parameter_rule(
    name: str, shape: tuple[int, ...], sizes: SplitSizes, adapters: Optimizer = "adamw_no_decay"
) -> ParameterRule:
    """Rule of the parameter `name` of `shape`, from the table of parameters; of an adapter, that of `adapters`."""
    if is_adapter(name):
        heights = (shape[-2],) * (shape[0] if len(shape) == 3 else 1)
        return ParameterRule(name, adapters, heights if adapters == "muon" else ())
    kind = row_of(name).optimizer
    return ParameterRule(name, kind, matrix_heights(name, shape, sizes) if kind == "muon" else ())


def split_parameters(
    named: Iterable[tuple[str, nn.Parameter]], config: SplitSizes, adapters: Optimizer = "adamw_no_decay"
) -> list[ParameterRule]:
    """Rules of the trainable parameters and the router biases, in the order of `named`."""
    return [
        parameter_rule(name, tuple(parameter.shape), config, adapters)
        for name, parameter in named
        if parameter.requires_grad or name.endswith("gate.bias")
    ]


class _Run(NamedTuple):
    """Adjacent matrices of one parameter: rows [start, stop) of the parameter as [all rows, columns]."""

    name: str
    start: int
    stop: int

    def of(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """View [N, *shape] of these matrices in the parameter, its gradient or its momentum."""
        return tensor.flatten(0, -2)[self.start : self.stop].view(-1, *shape)


@dataclass(frozen=True)
class _MuonGroup:
    """Matrices of one shape that are stepped together; few enough to stay in cache from gradient to weight."""

    shape: tuple[int, int]
    runs: list[_Run]

    @property
    def elements(self) -> int:
        return sum(run.stop - run.start for run in self.runs) * self.shape[1]


class MuonAdamW:
    """Optimizer of a model's trainable parameters: Muon for matrices, AdamW for the rest, one learning rate.

    Muon: M <- mu M + G; O = HybridNS(mu M + G) * sqrt(max(n, m)) * gamma; W <- W (1 - lr wd) - lr O.
    Matrices of one shape are stepped together: hundreds of experts then take a few batched products.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SplitSizes,
        *,
        momentum: float = 0.95,
        gamma: float = 0.18,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        compute_dtype: torch.dtype = torch.bfloat16,
        adapters: Optimizer = "adamw_no_decay",
    ) -> None:
        self.momentum, self.gamma, self.weight_decay, self.compute_dtype = momentum, gamma, weight_decay, compute_dtype
        # Keyword arguments with which a helper process builds its copy.
        self.settings: dict[str, Any] = {
            "momentum": momentum,
            "gamma": gamma,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "compute_dtype": compute_dtype,
            "adapters": adapters,
        }
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rules = split_parameters(model.named_parameters(), config, adapters)
        muon = [rule for rule in self.rules if rule.kind == "muon"]
        self._groups: dict[AttentionPhase, list[_MuonGroup]] = {"sparse": self._group_matrices(muon)}
        # By parameter name, in the parameter's shape.
        self._momenta = {r.name: torch.zeros_like(self.parameters[r.name], dtype=torch.float32) for r in muon}
        decayed = [self.parameters[rule.name] for rule in self.rules if rule.kind == "adamw"]
        plain = [self.parameters[rule.name] for rule in self.rules if rule.kind == "adamw_no_decay"]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]] or groups[:1]  # torch refuses no groups
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=True)

    def _group_matrices(self, rules: Iterable[ParameterRule]) -> list[_MuonGroup]:
        by_shape: dict[tuple[int, int], list[_Run]] = {}
        for rule in rules:
            width, start = self.parameters[rule.name].shape[-1], 0
            for rows in rule.rows:
                by_shape.setdefault((rows, width), []).append(_Run(rule.name, start, start + rows))
                start += rows
        groups: list[_MuonGroup] = []
        for (rows, width), matrices in by_shape.items():
            size = max(1, CHUNK_ELEMENTS // (rows * width))
            for first in range(0, len(matrices), size):
                groups.append(_MuonGroup((rows, width), _join(matrices[first : first + size])))
        # Costliest first, so that assigning them in turn loads the workers evenly.
        return sorted(groups, key=lambda group: -group.elements)

    @torch.no_grad()
    def step(
        self,
        lr: float,
        grad_scale: float = 1.0,
        worker: int = 0,
        workers: int = 1,
        attention: AttentionPhase = "sparse",
    ) -> None:
        """Apply one update at learning rate `lr`, gradients multiplied by `grad_scale` (clipping without another pass).

        A missing gradient counts as zero. Several workers that share weights, gradients and momenta step a part each:
        the Muon groups in turn; worker 0 also the AdamW parameters. Parameters that the phase does not train stay as
        they are, momenta too.
        """
        for group in self._groups_of(attention)[worker::workers]:
            gradient = torch.cat([self._gradient(run, group.shape) for run in group.runs])
            if grad_scale != 1.0:
                gradient.mul_(grad_scale)
            parts = gradient.split([(run.stop - run.start) // group.shape[0] for run in group.runs])
            for run, part in zip(group.runs, parts, strict=True):
                momentum = run.of(self._momenta[run.name], group.shape)
                momentum.mul_(self.momentum).add_(part)
                part.add_(momentum, alpha=self.momentum)
            update = orthogonalize(gradient, self.compute_dtype)
            scale = -lr * self.gamma * max(group.shape) ** 0.5
            for run, direction in zip(group.runs, update.split([len(part) for part in parts]), strict=True):
                weight = run.of(self.parameters[run.name].detach(), group.shape)
                weight.mul_(1.0 - lr * self.weight_decay).add_(direction, alpha=scale)
        if worker:
            return
        idle = {id(p) for name, p in self.parameters.items() if not trains(attention, name)}
        for group in self._adamw.param_groups:
            group["lr"] = lr
            for parameter in group["params"]:
                if id(parameter) in idle:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                elif grad_scale != 1.0:
                    parameter.grad.mul_(grad_scale)
        self._adamw.step()

    def _groups_of(self, phase: AttentionPhase) -> list[_MuonGroup]:
        """Groups of the matrices that a phase trains."""
        if phase not in self._groups:
            self._groups[phase] = self._group_matrices(
                rule for rule in self.rules if rule.kind == "muon" and trains(phase, rule.name)
            )
        return self._groups[phase]

    def _gradient(self, run: _Run, shape: tuple[int, int]) -> Tensor:
        parameter = self.parameters[run.name]
        if parameter.grad is None:
            return torch.zeros_like(run.of(parameter, shape), dtype=torch.float32)
        return run.of(parameter.grad, shape).float()

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient_norm(self, names: Container[str] | None = None) -> float:
        """L2 norm of all gradients together, before any scaling; with `names`, of these parameters'."""
        named = self.parameters.items()
        gradients = {n: p.grad for n, p in named if p.grad is not None and (names is None or n in names)}
        if not gradients:
            return 0.0
        # Per matrix, as the checkpoint has them: no bit depends on how tensors are stacked. And without zeros: an idle
        # expert's gradient may be zeros or none.
        norms = torch.stack([gradient.norm() for gradient in official_tensors(gradients).values()])
        return float(torch.linalg.vector_norm(norms[norms != 0]))

    def not_finite(self) -> list[str]:
        """Names of parameters whose gradient is not finite, as "gradient of <name>"; at most five."""
        named = ((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)
        return [f"gradient of {name}" for name, grad in named if not bool(grad.isfinite().all())][:5]

    def momenta(self) -> list[Tensor]:
        """Muon's momenta, not copied."""
        return list(self._momenta.values())

    def momentum_of(self, name: str) -> Tensor:
        """Muon's momentum of a parameter, not copied."""
        return self._momenta[name]

    def moments_of(self, name: str) -> tuple[Tensor, Tensor]:
        """AdamW's first and second moment of a parameter, not copied; start_adamw makes them before the first step."""
        state = self._adamw.state[self.parameters[name]]
        return state["exp_avg"], state["exp_avg_sq"]

    def start_adamw(self, updates: Mapping[AttentionPhase, int] | None = None) -> None:
        """Set AdamW's steps, which debias its moments, to a run's `updates` by phase; None: a run that begins.

        Missing moments become zeros, as in a first step.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter in (p for group in self._adamw.param_groups for p in group["params"]):
            state, name = self._adamw.state[parameter], names[id(parameter)]
            steps = sum(count for phase, count in (updates or {}).items() if trains(phase, name))
            state["step"] = torch.tensor(float(steps))
            for kind in ("exp_avg", "exp_avg_sq"):
                state.setdefault(kind, torch.zeros_like(parameter))

    def updates(self) -> dict[AttentionPhase, int]:
        """Updates by phase that add up to AdamW's steps of now, from which `start_adamw` sets them again."""
        steps: dict[AttentionPhase, int] = {}  # of what the phase trains, those of `sparse` among them
        for rule in self.rules:
            if rule.kind in ("adamw", "adamw_no_decay"):
                state = self._adamw.state.get(self.parameters[rule.name], {})
                steps["warmup" if trains("warmup", rule.name) else "dense"] = int(state.get("step", 0))
        both = min(steps.values(), default=0)
        found: dict[AttentionPhase, int] = {"sparse": both, "dense": 0, "warmup": 0}
        for phase, count in steps.items():
            found[phase] = count - both
        return found

    def share_momenta(self, momenta: Sequence[Tensor]) -> None:
        """Use the tensors `momenta`, in the order of another optimizer's `momenta()`, as the momenta."""
        self._momenta = dict(zip(self._momenta, momenta, strict=True))

    def _check_adamw(self, state: Mapping[str, Any]) -> None:
        """ValueError unless AdamW's moments have the shapes of its parameters, which torch does not check."""
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
        """Muon momenta and AdamW's state; tensors are not copied."""
        return {
            "muon": dict(self._momenta),
            "adamw": self._adamw.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. ValueError, with nothing changed, if it is of a model with other parameters."""
        saved = state["muon"]
        if {n: m.shape for n, m in saved.items()} != {n: m.shape for n, m in self._momenta.items()}:
            raise ValueError("optimizer state is of a model with other matrices than this one")
        self._check_adamw(state["adamw"])
        for name, momentum in self._momenta.items():
            momentum.copy_(saved[name])
        self._adamw.load_state_dict(state["adamw"])


def _join(matrices: Iterable[_Run]) -> list[_Run]:
    """Join adjacent matrices, given in order, into runs of maximal length."""
    runs: list[_Run] = []
    for matrix in matrices:
        if runs and (runs[-1].name, runs[-1].stop) == (matrix.name, matrix.start):
            matrix = _Run(matrix.name, runs.pop().start, matrix.stop)
        runs.append(matrix)
    return runs
