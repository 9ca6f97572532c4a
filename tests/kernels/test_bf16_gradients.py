"""Gradients whose products multiply BF16 numbers: exact products of rounded factors, summed in fp32."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import gradients
from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.gradients import bf16_gradients
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.linear import linear

from .tools import noise

SIZES = [(1, 1, 1), (3, 5, 7), (17, 33, 15), (12, 257, 96), (259, 40, 513), (600, 300, 70)]  # rows, in, out


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def check(got: Tensor, a: Tensor, b: Tensor) -> None:
    """got is a @ b, of factors rounded to BF16, within the error of fp32 sums."""
    want, size = rounded(a) @ rounded(b), rounded(a).abs() @ rounded(b).abs()
    assert ((got - want).abs() <= a.shape[1] * 2.0**-23 * size + 1e-30).all()


def slopes(out: Tensor, pull: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    d_x, d_weight = torch.autograd.grad(out, (x, weight), pull)
    return d_x, d_weight


def in_bf16(kernels: Any) -> None:
    if not kernels.has_bf16_gradients():
        pytest.skip(f"{kernels.selected()} has no BF16 products for gradients")


@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_linear(kernels: Any, rows: int, width: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bf16(kernels)
    x, weight = noise(rows, width).requires_grad_(), noise(outputs, width, seed=1).requires_grad_()
    pull, found = noise(rows, outputs, seed=2), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        with bf16_gradients():
            out = linear(x, weight)
        found.append(slopes(out, pull, x, weight))
    assert torch.equal(out, linear(x, weight)), "the forward is fp32"
    d_x, d_weight = found[0]
    assert all(torch.equal(d_x, other[0]) and torch.equal(d_weight, other[1]) for other in found[1:])
    check(d_x, pull, weight.detach())
    check(d_weight, pull.T, x.detach())


def test_grouped_linear(kernels: Any) -> None:
    in_bf16(kernels)
    sizes, x, weights = [3, 0, 70], noise(73, 33).requires_grad_(), noise(3, 21, 33, seed=1).requires_grad_()
    pull = noise(73, 21, seed=2)
    with bf16_gradients():
        out = grouped_linear(x, sizes, weights)
    d_x, d_weights = slopes(out, pull, x, weights)
    for rows, group in ((slice(0, 3), 0), (slice(3, 73), 2)):
        check(d_x[rows], pull[rows], weights[group].detach())
        check(d_weights[group], pull[rows].T, x[rows].detach())
    assert torch.equal(d_weights[1], torch.zeros(21, 33))


def test_cross_entropy_has_the_weight_gradient_of_linear(kernels: Any) -> None:
    in_bf16(kernels)
    x, weight, targets = noise(300, 33).requires_grad_(), noise(50, 33, seed=1).requires_grad_(), torch.arange(300) % 50
    with bf16_gradients():
        loss, _ = cross_entropy(x, weight, targets)
    d_x, d_weight = torch.autograd.grad(loss, (x, weight))
    pull = (x @ weight.T).detach().softmax(-1) - torch.nn.functional.one_hot(targets, 50)
    for got, a, b in ((d_x, pull, weight), (d_weight, pull.T, x)):
        want = a.double() @ b.detach().double()
        assert (got - want).abs().max() <= 2.0**-7 * want.abs().max()


def test_an_instruction_set_without_them_computes_fp32_and_says_so_once(
    kernels: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if kernels.has_bf16_gradients():
        pytest.skip("this one has them")
    gradients._say_fp32.cache_clear()
    x, weight, pull = noise(5, 33).requires_grad_(), noise(7, 33, seed=1).requires_grad_(), noise(5, 7, seed=2)
    with caplog.at_level(logging.WARNING, "dsv4"), bf16_gradients():
        ours = [slopes(linear(x, weight), pull, x, weight) for _ in range(2)]
    plain = slopes(linear(x, weight), pull, x, weight)
    assert all(torch.equal(a, b) for own in ours for a, b in zip(own, plain, strict=True))
    assert [record.message for record in caplog.records] == [
        f"kernels: fp32 products in gradients, because the instruction set {kernels.selected()} has none of BF16; "
        "avx512_bf16 has"
    ]
