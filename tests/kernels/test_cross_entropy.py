"""Cross-entropy of the head: only gradients that are asked for are computed and kept. Values: test_gradients.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.precision import Precision, precision

from .tools import noise, poisoned

TARGETS = torch.arange(300) * 7 % 50


def differentiated(name: Precision, wanted: tuple[bool, bool]) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """(loss, gradients of x [300, 33] and the head [50, 33] where wanted, what the backward keeps)."""
    x, weight = noise(300, 33).requires_grad_(wanted[0]), noise(50, 33, seed=1).requires_grad_(wanted[1])
    with precision(name):
        loss, _ = cross_entropy(x, weight, TARGETS)
    node: Any = loss.grad_fn
    kept = [tensor for tensor in getattr(node, "saved_tensors", ()) if tensor is not None]
    (2.0 * loss).backward()
    return loss.detach(), [x.grad, weight.grad], kept


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_frozen_leaf_has_no_gradient_and_the_other_one_the_same_bits(rung: str, name: Precision) -> None:
    loss, both, _ = differentiated(name, (True, True))
    for wanted in ((True, False), (False, True)):
        alone, grads, kept = differentiated(name, wanted)
        assert torch.equal(alone, loss)
        for got, want, asked in zip(grads, both, wanted, strict=True):
            assert want is not None and (torch.equal(got, want) if got is not None else not asked)
        if rung != "reference":
            assert [list(tensor.shape) for tensor in kept] == [[300, 33] if wanted[0] else [50, 33]]


def test_the_kernel_writes_one_gradient_without_the_other(kernels: Any) -> None:
    x, weight = noise(300, 33), noise(50, 33, seed=1)
    found = []
    for d_x, d_weight in ((True, True), (True, False), (False, True)):
        grads = [poisoned(300, 33) if d_x else None, poisoned(50, 33) if d_weight else None]
        kernels.cross_entropy(x, weight, TARGETS, torch.empty(300), torch.empty(300, dtype=torch.int64), *grads)
        found.append(grads)
    assert torch.equal(found[1][0], found[0][0]) and torch.equal(found[2][1], found[0][1])
    assert found[0][0].isfinite().all() and found[0][1].isfinite().all()
