"""Sinkhorn normalization: every rung against the formula, gradients, independence of the tokens."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.sinkhorn import sinkhorn

from .tools import check_derivatives, near, noise


def formula(logits: Tensor, iters: int, eps: float) -> Tensor:
    c = torch.softmax(logits, 2) + eps
    c = c / (c.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(2, keepdim=True) + eps)
        c = c / (c.sum(1, keepdim=True) + eps)
    return c


CASES = [(4, 20, 1e-6), (4, 1, 1e-6), (3, 2, 0.05), (1, 2, 1e-6), (5, 20, 1e-6)]  # streams, iterations, eps


@pytest.mark.parametrize(("streams", "iters", "eps"), CASES)
def test_output_and_independence_of_tokens(rung: str, streams: int, iters: int, eps: float) -> None:
    logits = noise(80, streams, streams, scale=3.0)
    kept = logits.clone()
    got = sinkhorn(logits, iters, eps)
    assert near(got, formula(logits.double(), iters, eps).float(), 1e-5)
    for count in (1, 2, 17, 63):
        assert torch.equal(sinkhorn(logits[:count], iters, eps), got[:count])
    assert torch.equal(logits, kept), "the input stays"


@pytest.mark.parametrize(("streams", "iters", "eps"), CASES)
def test_gradients(streams: int, iters: int, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native_module", lambda: None)  # which has none: it is a part of mhc
    for count in (1, 5, 66):
        tolerance = 1e-5 if streams > 1 else 1e-3  # one stream: the gradient is nearly zero
        check_derivatives(
            lambda x: sinkhorn(x, iters, eps),
            lambda x: formula(x, iters, eps),
            (noise(count, streams, streams, scale=2.0),),
            tolerance,
        )


def test_too_many_streams_for_the_native_rung_are_reported(rung: str) -> None:
    if rung == "reference":
        assert sinkhorn(noise(1, 65, 65), 2, 1e-6).shape == (1, 65, 65)
        return
    with pytest.raises(backends.KernelChoiceError, match="sinkhorn has 65 streams, its native kernel takes 64"):
        sinkhorn(noise(1, 65, 65), 2, 1e-6)
