"""Tensors that the backward computes again: the same gradients, freed after their last use, kept inside checkpoints."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.recomputed import KEPT, Recomputed, keeping_all, recomputed
from dsv4.training.gradient import pack_batch
from dsv4.training.losses import LossWeights, compute_losses
from tests.training.tiny_training import Rows, draw_documents, make_model


@pytest.mark.parametrize("rung", ["native", "reference"])
def test_gradients_are_those_of_kept_tensors(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rung == "native" and backends.native_module() is None:
        pytest.skip("no native kernels here")
    if rung == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    found: list[list[Tensor]] = []
    for kept in (False, True):
        model, _ = make_model()
        batch = pack_batch(Rows(draw_documents(3, 140)), torch.device("cpu"))
        if kept:
            with keeping_all():
                loss = compute_losses(model, batch.batch, batch.mask, LossWeights(), AuxLosses())
        else:
            loss = compute_losses(model, batch.batch, batch.mask, LossWeights(), AuxLosses())
        loss[0].backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 30 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_tensor_is_freed_by_the_forward_and_made_once_per_backward() -> None:
    x, made = torch.randn(5, 3, requires_grad=True), []

    def make() -> Tensor:
        made.append(1)
        return x.detach() * 2

    y = x * 2
    place = weakref.ref(y)
    with recomputed(y, make).unkept():
        loss = (y * y).sum() + (y.view(15) ** 3).sum()
    del y
    gc.collect()
    assert place() is None and not made
    loss.backward()
    assert len(made) == 1
    other = x.detach().clone().requires_grad_()
    (((other * 2) ** 2).sum() + ((other * 2) ** 3).sum()).backward()
    assert x.grad is not None and other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)


def test_nothing_is_recomputed_without_a_gradient_or_where_all_is_kept() -> None:
    x = torch.ones(2)
    assert recomputed(x, lambda: x) is KEPT
    y = torch.ones(2, requires_grad=True) * 1
    with keeping_all():
        assert recomputed(y, lambda: x) is KEPT
    assert isinstance(recomputed(y, lambda: x), Recomputed)
