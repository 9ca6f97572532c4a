"""Kernels with a derivative written out: SwiGLU, Sinkhorn, the mHC maps, grouped linear."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.mhc.reference import collect, distribute, mixes
from dsv4.kernels.sinkhorn import sinkhorn
from dsv4.kernels.swiglu import clamped_swiglu

from .derivatives import check_derivatives, noise

# Clamped SwiGLU


def plain_swiglu(gate: Tensor, up: Tensor, weight: Tensor | float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up * weight


@pytest.mark.parametrize("limit", [0.7, 10.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 40)])
def test_swiglu(shape: tuple[int, int], limit: float) -> None:
    gate, up, weight = noise(*shape), noise(*shape, seed=1, scale=2.0), noise(shape[0], 1, seed=2)
    check_derivatives(lambda g, u: clamped_swiglu(g, u, limit), lambda g, u: plain_swiglu(g, u, 1.0, limit), (gate, up))
    check_derivatives(
        lambda g, u, w: clamped_swiglu(g, u, limit, w),
        lambda g, u, w: plain_swiglu(g, u, w, limit),
        (gate, up, weight),
    )


def test_swiglu_at_the_extremes() -> None:
    gate = torch.tensor([[-200.0, -20.0, 20.0, 200.0]])
    out = clamped_swiglu(gate, torch.tensor([[300.0, -300.0, 300.0, -300.0]]), 10.0)
    want = torch.tensor([[0.0, 20 / (1 + torch.e**20) * 10, 100 / (1 + torch.e**-10), -100 / (1 + torch.e**-10)]])
    assert torch.allclose(out, want, rtol=1e-5, atol=0)


# Sinkhorn


def plain_sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    c = torch.softmax(logits, 2) + eps
    c = c / (c.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(2, keepdim=True) + eps)
        c = c / (c.sum(1, keepdim=True) + eps)
    return c


@pytest.mark.parametrize(("streams", "iters", "eps"), [(4, 20, 1e-6), (4, 1, 1e-6), (3, 2, 0.05), (1, 2, 1e-6)])
def test_sinkhorn(streams: int, iters: int, eps: float) -> None:
    for count in (1, 5, 66):
        logits = noise(count, streams, streams, scale=2.0)
        tolerance = 1e-5 if streams > 1 else 1e-3  # one stream: the gradient is nearly nothing
        check_derivatives(
            lambda x: sinkhorn(x, iters, eps), lambda x: plain_sinkhorn(x, iters, eps), (logits,), tolerance
        )


def test_sinkhorn_of_few_tokens_has_the_bits_of_many() -> None:
    many = noise(80, 4, 4, scale=3.0)
    for count in (1, 2, 3, 17, 63):
        assert torch.equal(sinkhorn(many[:count], 20, 1e-6), sinkhorn(many, 20, 1e-6)[:count])


def test_sinkhorn_leaves_its_input_alone() -> None:
    logits = noise(3, 4, 4)
    kept = logits.clone()
    with torch.no_grad():
        sinkhorn(logits, 5, 1e-6)
    assert torch.equal(logits, kept)


# mHC maps


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_mixes(tokens: int) -> None:
    check_derivatives(
        lambda x, fn: mixes(x, fn, 1e-6),
        lambda x, fn: (x.flatten(1) @ fn.mT) * (x.flatten(1).square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
        (noise(tokens, 4, 24), noise(9, 96, seed=1)),
    )


def test_mixes_of_zero_streams_are_zero() -> None:
    assert torch.equal(mixes(torch.zeros(2, 4, 8), noise(3, 32), 1e-6), torch.zeros(2, 3))


@pytest.mark.parametrize("tokens", [1, 5])
def test_collect_and_distribute(tokens: int) -> None:
    streams, y = noise(tokens, 3, 17), noise(tokens, 17, seed=1)
    weights, comb = noise(tokens, 3, seed=2), noise(tokens, 3, 3, seed=3)
    check_derivatives(collect, lambda w, s: torch.einsum("ts,tsd->td", w, s), (weights, streams))
    check_derivatives(
        distribute,
        lambda y, s, post, comb: torch.einsum("ts,td->tsd", post, y) + torch.einsum("tjk,tjd->tkd", comb, s),
        (y, streams, weights, comb),
    )


def test_stream_maps_keep_bfloat16() -> None:
    streams, weights = noise(4, 3, 8).bfloat16(), noise(4, 3, seed=1)
    assert collect(weights, streams).dtype == torch.bfloat16
    assert distribute(streams[:, 0], streams, weights, noise(4, 3, 3)).dtype == torch.bfloat16
    assert mixes(streams, noise(2, 24), 1e-6).dtype == torch.float32


# Grouped linear


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [1, 1, 1, 6]])
def test_grouped_linear(sizes: list[int]) -> None:
    def formula(x: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([part @ w.mT for part, w in zip(x.split(sizes), weights, strict=True)])

    kernel = partial(_grouped, sizes)
    check_derivatives(kernel, formula, (noise(9, 13), noise(4, 7, 13, seed=1)))


def _grouped(sizes: list[int], x: Tensor, weights: Tensor) -> Tensor:
    return grouped_linear(x, sizes, weights)


def test_a_group_without_rows_is_not_read_and_its_gradient_is_zero() -> None:
    x, weights = noise(2, 3).requires_grad_(), noise(3, 4, 3, seed=1)
    weights[::2] = float("nan")
    out = grouped_linear(x, [0, 2, 0], weights.requires_grad_())
    out.sum().backward()
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert weights.grad is not None and [bool(g.any()) for g in weights.grad] == [False, True, False]
