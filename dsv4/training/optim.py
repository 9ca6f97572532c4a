"""Muon and AdamW in one optimizer, with DeepSeek V4's split and settings (report, Muon and Training Setups).

model/parameters.py lists each parameter's optimizer and the independent matrices that it holds. The router's
`gate.bias` has neither: balance.py updates it by rule.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv4.model.lora import is_adapter
from dsv4.model.parameters import Optimizer, SplitSizes, matrix_shapes, row_of
from dsv4.model.stacks import official_tensors
from dsv4.training.attention_phase import AttentionPhase, trains
from dsv4.training.newton_schulz import CHUNK_ELEMENTS, orthogonalize


@dataclass(frozen=True)
class ParameterRule:
    """Optimizer of one parameter; `matrices` are the shapes of the independent matrices in a Muon parameter, in order.

    They lie one below the other, or, if they have fewer columns than the parameter, side by side.
    """

    name: str
    kind: Optimizer
    matrices: tuple[tuple[int, int], ...] = ()


def parameter_rule(
    name: str,
    shape: tuple[int, ...],
    sizes: SplitSizes,
    adapters: Optimizer = "adamw_no_decay",
    matrices: Optimizer = "muon",
) -> ParameterRule:
    """Rule of the parameter `name` of `shape`, from the table of parameters.

    Of an adapter it is that of `adapters`, and of a parameter for which the table has Muon, that of `matrices`.
    """
    if is_adapter(name):
        shapes = ((shape[-2], shape[-1]),) * (shape[0] if len(shape) == 3 else 1)
        return ParameterRule(name, adapters, shapes if adapters == "muon" else ())
    kind = row_of(name).optimizer
    if kind == "muon":
        kind = matrices
    return ParameterRule(name, kind, matrix_shapes(name, shape, sizes) if kind == "muon" else ())


def split_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
    config: SplitSizes,
    adapters: Optimizer = "adamw_no_decay",
    matrices: Optimizer = "muon",
) -> list[ParameterRule]:
    """Rules of the trainable parameters and the router biases, in the order of `named`."""
    return [
        parameter_rule(name, tuple(parameter.shape), config, adapters, matrices)
        for name, parameter in named
        if parameter.requires_grad or name.endswith("gate.bias")
    ]


class _Run(NamedTuple):
    """Adjacent matrices of one shape in a parameter: rows [start, stop) of all its matrices, one below the other."""

    name: str
    start: int
    stop: int

    def of(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """View [N, *shape] of these matrices in the parameter, its gradient or its momentum."""
        rows, width = shape
        stacked = tensor.flatten(0, -2)
        if stacked.shape[1] == width:
            return stacked[self.start : self.stop].view(-1, rows, width)
        side_by_side = stacked.unflatten(1, (-1, width)).transpose(0, 1)
        return side_by_side[self.start // rows : self.stop // rows]


@dataclass(frozen=True)
class _MuonGroup:
    """Matrices of one shape that are stepped together; few enough to stay in cache from gradient to weight."""

    shape: tuple[int, int]
    runs: list[_Run]

    @property
    def sizes(self) -> list[int]:
        """Number of matrices in each run."""
        return [(run.stop - run.start) // self.shape[0] for run in self.runs]

    @property
    def elements(self) -> int:
        return sum(self.sizes) * self.shape[0] * self.shape[1]


class MuonAdamW:
    """Optimizer of a model's trainable parameters: Muon for matrices, AdamW for the rest, one learning rate.

    Muon: M <- mu M + G; O = HybridNS(mu M + G) * sqrt(max(n, m)) * gamma; W <- W (1 - lr wd) - lr O.
    What no gradient reaches in a step stays as it is. Matrices of one shape are stepped together: hundreds of experts
    then take a few batched products. With `matrices="adamw"` AdamW steps them too, each parameter whole.
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
        matrices: Optimizer = "muon",
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
            "matrices": matrices,
        }
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rules = split_parameters(model.named_parameters(), config, adapters, matrices)
        muon = [rule for rule in self.rules if rule.kind == "muon"]
        self._groups: dict[AttentionPhase, list[_MuonGroup]] = {"sparse": self._group_matrices(muon)}
        # By parameter name, in the parameter's shape.
        self._momenta = {r.name: torch.zeros_like(self.parameters[r.name], dtype=torch.float32) for r in muon}
        self._adamw_names = [rule.name for rule in self.rules if rule.kind in ("adamw", "adamw_no_decay")]
        decayed = [self.parameters[rule.name] for rule in self.rules if rule.kind == "adamw"]
        plain = [self.parameters[rule.name] for rule in self.rules if rule.kind == "adamw_no_decay"]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]] or groups[:1]  # torch refuses no groups
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=True)

    def _group_matrices(self, rules: Iterable[ParameterRule]) -> list[_MuonGroup]:
        by_shape: dict[tuple[int, int], list[_Run]] = {}
        for rule in rules:
            start = 0
            for rows, width in rule.matrices:
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
        reached: Set[str] | None = None,
    ) -> None:
        """Apply one update at learning rate `lr`, gradients multiplied by `grad_scale` (clipping without another pass).

        A matrix, or a parameter of AdamW's, whose gradient is missing or all zeros stays as it is, its moments too.
        `reached` names AdamW's parameters that are stepped, where ranks have parts of them; None: `reached_by_adamw`.
        Several workers that share weights, gradients and momenta step a part each: the Muon groups in turn; worker 0
        also the AdamW parameters. Parameters that the phase does not train stay as they are, momenta too.
        """
        groups = self._groups_of(attention)[worker::workers]
        for group, found in zip(groups, self._reached(groups), strict=True):
            if found.any():
                self._step_matrices(group, found, lr, grad_scale)
        if worker == 0:
            self._step_adamw(lr, grad_scale, attention, self.reached_by_adamw() if reached is None else reached)

    def _step_matrices(self, group: _MuonGroup, reached: Tensor, lr: float, grad_scale: float) -> None:
        """Step the matrices of a group that `reached`, bool [N] on the host, marks."""
        gradient = torch.cat([self._gradient(run, group.shape) for run in group.runs])
        if grad_scale != 1.0:
            gradient.mul_(grad_scale)
        mask = reached.to(gradient.device)
        decay = torch.where(mask, self.momentum, 1.0).view(-1, 1, 1)  # the others are multiplied by 1, and add zeros
        shrink = torch.where(mask, 1.0 - lr * self.weight_decay, 1.0).view(-1, 1, 1)
        for run, part, factor in zip(group.runs, gradient.split(group.sizes), decay.split(group.sizes), strict=True):
            momentum = run.of(self._momenta[run.name], group.shape)
            momentum.mul_(factor).add_(part)
            part.add_(momentum, alpha=self.momentum)
        if reached.all():
            update = orthogonalize(gradient, self.compute_dtype)
        else:
            update = torch.zeros_like(gradient)
            update[mask] = orthogonalize(gradient[mask], self.compute_dtype)
        scale = -lr * self.gamma * max(group.shape) ** 0.5
        for run, part, factor in zip(group.runs, update.split(group.sizes), shrink.split(group.sizes), strict=True):
            weight = run.of(self.parameters[run.name].detach(), group.shape)
            weight.mul_(factor).add_(part, alpha=scale)

    def _step_adamw(self, lr: float, grad_scale: float, attention: AttentionPhase, reached: Set[str]) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name in self._adamw_names:
            parameter = self.parameters[name]
            if not trains(attention, name):
                parameter.grad = None
            elif name not in reached:
                parameter.grad = None
                # Debiasing is by the run's updates, which a checkpoint has, not by each parameter's own.
                self._begun(parameter)["step"] += 1
            elif parameter.grad is None:  # others have a gradient of their parts
                parameter.grad = torch.zeros_like(parameter)
            elif grad_scale != 1.0:
                parameter.grad.mul_(grad_scale)
        self._adamw.step()

    def _begun(self, parameter: nn.Parameter) -> dict[str, Any]:
        """AdamW's state of a parameter; what is missing is as before a first step."""
        state = self._adamw.state[parameter]
        state.setdefault("step", torch.tensor(0.0))
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind not in state:
                state[kind] = torch.zeros_like(parameter)
        return state

    def _reached(self, groups: Sequence[_MuonGroup]) -> list[Tensor]:
        """The matrices of each group whose gradient is not all zeros, bool [N] on the host.

        Momentum would go on moving the others: orthogonalized, it has full size until it has decayed below the floor
        of Newton-Schulz. One transfer from a GPU for all groups.
        """
        if not groups:
            return []
        marks = torch.cat([self._marks(run, group.shape) for group in groups for run in group.runs])
        return list(marks.cpu().split([sum(group.sizes) for group in groups]))

    def _marks(self, run: _Run, shape: tuple[int, int]) -> Tensor:
        gradient = self.parameters[run.name].grad
        if gradient is None:
            count = (run.stop - run.start) // shape[0]
            return torch.zeros(count, dtype=torch.bool, device=self.parameters[run.name].device)
        return _not_zero(run.of(gradient, shape), (1, 2))

    @torch.no_grad()
    def reached_by_adamw(self) -> set[str]:
        """Names of AdamW's parameters whose gradient is not all zeros."""
        named = ((name, self.parameters[name].grad) for name in self._adamw_names)
        found = {name: gradient for name, gradient in named if gradient is not None}
        if not found:
            return set()
        marks = torch.stack([_not_zero(gradient) for gradient in found.values()]).tolist()
        return {name for name, mark in zip(found, marks, strict=True) if mark}

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
        for name in self._adamw_names:
            steps = sum(count for phase, count in (updates or {}).items() if trains(phase, name))
            self._begun(self.parameters[name])["step"] = torch.tensor(float(steps))

    def updates(self) -> dict[AttentionPhase, int]:
        """Updates by phase that add up to AdamW's steps of now, from which `start_adamw` sets them again."""
        steps: dict[AttentionPhase, int] = {}  # of what the phase trains, those of `sparse` among them
        for name in self._adamw_names:
            state = self._adamw.state.get(self.parameters[name], {})
            steps["warmup" if trains("warmup", name) else "dense"] = int(state.get("step", 0))
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


def _not_zero(gradient: Tensor, dimensions: tuple[int, ...] = ()) -> Tensor:
    """True where a number along `dimensions`, () being all, is not zero, as NaN is not. Faster than `any`."""
    return (gradient.amax(dimensions) != 0) | (gradient.amin(dimensions) != 0)
