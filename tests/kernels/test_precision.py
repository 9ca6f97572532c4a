"""Products of factors rounded to BF16 or FP8, forward and backward: exact products of these, summed in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.linear import linear, linear_fp32
from dsv4.kernels.precision import Precision, current, precision

from .tools import noise

SIZES = [(1, 1, 1), (3, 5, 7), (17, 33, 15), (12, 257, 96), (259, 40, 513), (600, 300, 70)]  # rows, in, out


def bf16(x: Tensor) -> Tensor:
    rounded = x.bfloat16().double()
    return torch.where(rounded.abs() < 2.0**-56, 0.0, rounded)


def fp8(x: Tensor, height: int, width: int, floor: float = 448.0 * 2.0**-126) -> Tensor:
    """e4m3 with one power-of-two scale per block of `height` rows and `width` columns, block after block."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            block = x[i : i + height, j : j + width].double()
            scale = 2.0 ** torch.ceil(torch.log2(block.abs().max().clamp(min=floor) / 448.0))
            out[i : i + height, j : j + width] = (block / scale).float().to(torch.float8_e4m3fn).double() * scale
    return out


def check(got: Tensor, a: Tensor, b: Tensor, least: float = 0.0) -> None:
    """got is a @ b within the error of fp32 sums; factors of a magnitude below `least` may be zero."""
    size, small = a.abs() @ b.abs(), least * (a.abs().sum(1, keepdim=True) + b.abs().sum(0) + least * a.shape[1])
    assert ((got - a @ b).abs() <= a.shape[1] * 2.0**-23 * size + small + 1e-30).all()


def check_products(name: Precision, x: Tensor, weight: Tensor, pull: Tensor, got: tuple[Tensor, ...]) -> None:
    """got: y, dx and dW of a linear map with dy = pull, against a restatement of the rounding of each factor."""
    y, d_x, d_weight = got
    if name == "bf16":
        check(y, bf16(x), bf16(weight).T)
        check(d_x, bf16(pull), bf16(weight), 2.0**-56)
        check(d_weight, bf16(pull).T, bf16(x), 2.0**-56)
        return
    rows = fp8(x, 1, 128, 1e-4)
    blocks = bf16(fp8(weight, 128, 128))  # exact but for zeros
    check(y, rows, blocks.T)
    check(d_x, fp8(pull, 1, 128), blocks)
    check(d_weight, fp8(pull, 128, 1).T, fp8(rows.float(), 128, 1))


def leaves(rows: int, width: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, pull = noise(rows, width), noise(outputs, width, seed=1), noise(rows, outputs, seed=2, scale=1e-7)
    x[0, 0], weight[-1, -1] = 1e-20, -1e-18  # too small for the forward's factors in BF16
    return x.requires_grad_(), weight.requires_grad_(), pull


def run_linear(name: Precision, x: Tensor, weight: Tensor, pull: Tensor) -> tuple[Tensor, ...]:
    with precision(name):
        out = linear(x, weight)
        assert torch.equal(linear(x, weight), out), "the kept weight"
    with torch.no_grad(), precision(name):
        assert torch.equal(linear(x, weight), out)
    return (out, *torch.autograd.grad(out, (x, weight), pull))


@pytest.mark.parametrize("name", ["bf16", "fp8"])
@pytest.mark.parametrize(("rows", "width", "outputs"), SIZES)
def test_linear(
    rung: str, name: Precision, rows: int, width: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, pull = leaves(rows, width, outputs)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found.append(run_linear(name, x, weight, pull))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    check_products(name, x.detach(), weight.detach(), pull, found[0])


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_grouped_linear(rung: str, name: Precision) -> None:
    sizes, x, weights = [3, 0, 150], noise(153, 130).requires_grad_(), noise(3, 21, 130, seed=1).requires_grad_()
    pull = noise(153, 21, seed=2, scale=1e-3)
    with precision(name):
        out = grouped_linear(x, sizes, weights)
    d_x, d_weights = torch.autograd.grad(out, (x, weights), pull)
    for rows, group in ((slice(0, 3), 0), (slice(3, 153), 2)):
        got = out[rows], d_x[rows], d_weights[group]
        check_products(name, x[rows].detach(), weights[group].detach(), pull[rows], got)
    assert torch.equal(d_weights[1], torch.zeros(21, 130))


def test_bf16_products_have_the_bits_of_fp32_sums_on_every_instruction_set(kernels: Any) -> None:
    """But for AMX, whose tiles have their own order, and portable code, which rounds each product."""
    if kernels.selected() in ("amx", "portable"):
        pytest.skip("another order of sums")
    isa = kernels.selected()
    for rows in (1, 2, 40):
        x, weight, _ = (t.detach() for t in leaves(rows, 300, 70))
        with precision("bf16"):
            got = linear(x, weight)
        kernels.select("avx2")
        assert torch.equal(got, linear_fp32(bf16(x).float(), bf16(weight).float()))
        kernels.select(isa)


def test_other_products_and_other_contexts_stay_fp32(rung: str) -> None:
    x, weight, _ = (t.detach() for t in leaves(9, 33, 7))
    want = linear(x, weight)
    with precision("bf16"):
        assert current() == "bf16" and not torch.equal(linear(x, weight), want)
        assert torch.equal(linear_fp32(x, weight), want)
        with precision("fp32"):
            assert torch.equal(linear(x, weight), want)
    assert current() == "fp32" and torch.equal(linear(x, weight), want)


def test_a_weight_that_changed_is_rounded_anew(rung: str) -> None:
    x, weight = noise(3, 40), noise(5, 40, seed=1)
    with precision("bf16"):
        before = linear(x, weight)
        weight.mul_(2.0)
        assert torch.equal(linear(x, weight), 2.0 * before)


def test_cross_entropy_has_bf16_gradients(kernels: Any) -> None:
    x, weight, targets = noise(300, 33).requires_grad_(), noise(50, 33, seed=1).requires_grad_(), torch.arange(300) % 50
    plain, _ = cross_entropy(x, weight, targets)
    with precision("bf16"):
        loss, _ = cross_entropy(x, weight, targets)
    assert torch.equal(loss, plain), "the forward is fp32"
    d_x, d_weight = torch.autograd.grad(loss, (x, weight))
    pull = (x @ weight.T).detach().softmax(-1) - torch.nn.functional.one_hot(targets, 50)
    for got, a, b in ((d_x, pull, weight), (d_weight, pull.T, x)):
        want = a.double() @ b.detach().double()
        assert (got - want).abs().max() <= 2.0**-7 * want.abs().max()


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed are fp32, bf16, fp8"), precision("fp16"):  # pyright: ignore
        pass


@pytest.mark.gpu
def test_cuda_multiplies_the_same_numbers() -> None:
    x, weight, pull = (t.detach().cuda() for t in leaves(100, 300, 70))
    got = run_linear("bf16", x.requires_grad_(), weight.requires_grad_(), pull)
    check_products("bf16", x.detach().cpu(), weight.detach().cpu(), pull.cpu(), tuple(t.cpu() for t in got))


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_a_weight_with_other_memory_is_rounded_anew(rung: str, name: Precision) -> None:
    x, weight = noise(3, 40), nn.Parameter(noise(5, 40, seed=1))
    with torch.no_grad(), precision(name):
        before = linear(x, weight)
        weight.data = 2.0 * weight.data
        assert torch.equal(linear(x, weight), 2.0 * before)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_another_weight_in_the_same_memory_is_rounded_anew(name: Precision) -> None:
    """As FSDP gathers one block's weights where another's were."""
    memory = np.ones((8, 16), dtype=np.float32)
    x = torch.ones(3, 16)
    with precision(name):
        first = linear(x, nn.Parameter(torch.from_numpy(memory)))
        memory[:] = 2.0
        second = linear(x, nn.Parameter(torch.from_numpy(memory)))
    assert torch.equal(second, 2 * first)
