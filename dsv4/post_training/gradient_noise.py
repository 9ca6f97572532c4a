"""Noise of distillation's gradient on the same samples: over the full vocabulary, and by the sampled token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4.post_training.distillation import DistillationRun, Estimate

ESTIMATES: tuple[Estimate, ...] = ("full", "sampled")


@dataclass(frozen=True)
class Noise:
    """Gradients of several batches: the square of their mean's norm, and their variance around it, over parameters."""

    signal: float
    variance: float

    @property
    def ratio(self) -> float:
        return self.variance / self.signal if self.signal else float("inf")


def gradient_noise(run: DistillationRun, batches: int) -> dict[Estimate, Noise]:
    """Noise of either estimate at the run's student, over `batches` batches as large as its steps; updates nothing.

    The problems of these batches count as asked. ValueError for fewer than 2 batches.
    """
    if batches < 2:
        raise ValueError(f"{batches} batches; allowed: 2 or more, for a variance")
    sums: dict[Estimate, Tensor] = {}
    squares = dict.fromkeys(ESTIMATES, 0.0)
    settings = run.settings
    for _ in range(batches):
        samples, problems = run.sample()
        by_domain = run.by_domain(samples, problems)
        run.teachers.store(by_domain, settings.micro_tokens)
        for estimate in ESTIMATES:
            run.settings = replace(settings, estimate=estimate, balance=0.0, indexer=0.0)
            run.optimizer.zero_grad()
            run.add_gradient(by_domain)
            gradient = _gradient(run)
            squares[estimate] += float(gradient.square().sum())
            sums[estimate] = sums[estimate] + gradient if estimate in sums else gradient
        run.optimizer.zero_grad()
        run.settings = settings
        for sample in samples:
            sample.release()
    found: dict[Estimate, Noise] = {}
    for estimate in ESTIMATES:
        around = float((sums[estimate] / batches).square().sum())
        variance = max(0.0, squares[estimate] / batches - around) * batches / (batches - 1)
        found[estimate] = Noise(
            max(0.0, around - variance / batches), variance
        )  # unbiased: noise adds to a mean's norm
    return found


def _gradient(run: DistillationRun) -> Tensor:
    """Gradient of all parameters, laid end to end."""
    return torch.cat([p.grad.flatten().float() for p in run.policy.model.parameters() if p.grad is not None])
