"""Linear: every rung against float64, rows and threads; the native products' order of sums, and their gradients."""

import platform
from typing import Any

import pytest
import torch

from dsv4.kernels import backends
from dsv4.kernels.linear import linear

from .tools import check_derivatives, noise, poisoned, set_threads

SHAPES = [
    (1, 512, 1024),
    (1, 40, 17),
    (2, 33, 50),
    (5, 257, 16),
    (6, 300, 15),
    (7, 64, 97),
    (13, 31, 160),
    (97, 520, 130),
]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_output(rung: str, rows: int, inputs: int, outputs: int) -> None:
    """A weight's memory layout, threads and other rows change no bit of the native products."""
    x, weight = noise(rows, inputs), noise(outputs, inputs, seed=1)
    want, got = x.double() @ weight.double().t(), linear(x, weight)
    assert (got - want).abs().max() < 2e-6 * inputs**0.5 * want.abs().max()
    assert linear(x.view(rows, 1, inputs), weight).shape == (rows, 1, outputs)
    if rung == "reference":
        return
    wide = torch.cat((weight, weight), dim=1)[:, :inputs]
    for threads in (1, 2, 3):
        set_threads(rung, threads)
        assert torch.equal(linear(x, weight), got) and torch.equal(linear(x, wide), got)
    for row in range(0, rows, max(1, rows // 5)):
        assert torch.equal(linear(x[row : row + 1], weight)[0], got[row])


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 40, 17), (9, 13, 70), (301, 31, 33)])
def test_gradients(rung: str, rows: int, inputs: int, outputs: int) -> None:
    weight = noise(outputs, inputs, seed=1)
    set_threads(rung, 2)
    check_derivatives(linear, lambda x, w: x @ w.mT, (noise(rows, inputs), weight))
    check_derivatives(lambda x, w: linear(x.mT, w), lambda x, w: x.mT @ w.mT, (noise(inputs, rows), weight))
    check_derivatives(linear, lambda x, w: x @ w.mT, (noise(2, rows, inputs), weight))


@pytest.mark.parametrize("inputs", [1, 30, 64, 333])
def test_sums_run_in_the_documented_order(kernels: Any, inputs: int) -> None:
    """Eight sums, joined in pairs. Products of BF16 numbers are exact in fp32, so only the additions round."""
    x, weight = noise(5, inputs).bfloat16().float(), noise(35, inputs, seed=1).bfloat16().float()
    products = x[:, None] * weight
    sums = [torch.zeros(5, 35) for _ in range(8)]
    for k in range(inputs):
        sums[4 * (k % 2) + k // 4 % 4] += products[..., k]
    want = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
    got = poisoned(5, 35)
    kernels.linear(x, weight, got)
    assert torch.equal(got, want)


def test_a_product_skips_no_row_and_touches_no_neighbor(kernels: Any) -> None:
    x, weight = noise(9, 70), noise(21, 70, seed=1)
    frame = poisoned(11, 21)
    kernels.linear(x, weight, frame[1:10])
    assert frame[1:10].isfinite().all() and frame[0].isnan().all() and frame[10].isnan().all()


def test_wrong_shapes_are_refused(kernels: Any) -> None:
    with pytest.raises(ValueError, match=r"y: shape \[2, 5\], expected \[2, 4\]"):
        kernels.linear(noise(2, 3), noise(4, 3), poisoned(2, 5))
    with pytest.raises(ValueError, match=r"x: shape \[2, 3\], expected \[2, 7\]"):
        kernels.linear(noise(2, 3), noise(4, 7), poisoned(2, 4))


@pytest.mark.parametrize("rows", [13, 300])
def test_a_row_of_the_gradient_depends_on_that_row_alone(kernels: Any, rows: int) -> None:
    kernels.set_threads(2)
    dy, weight, dx = noise(rows, 290), noise(290, 50, seed=1), poisoned(rows, 50)
    kernels.input_gradients(dy, [rows], [weight], dx)
    for first, count in ((0, 1), (rows - 1, 1), (5, 7), (2, rows - 2)):
        alone = poisoned(count, 50)
        kernels.input_gradients(dy[first : first + count], [count], [weight], alone)
        assert torch.equal(alone, dx[first : first + count])


def test_sums_of_gradients_run_in_the_documented_order(kernels: Any) -> None:
    """As in docs/kernels.md: chains of 256 terms from zero, ascending, their sums added in order."""
    terms = 600
    a, b = noise(terms, 2), noise(terms, 3, seed=1)
    want = torch.zeros(2, 3)
    fused = kernels.selected() != "portable" or platform.machine() in ("aarch64", "arm64")
    for start in range(0, terms, 256):
        chain = torch.zeros(2, 3)
        for t in range(start, min(terms, start + 256)):
            product = a[t].double()[:, None] * b[t].double()
            chain = (chain.double() + product).float() if fused else chain + product.float()
        want = want + chain
    as_gradient, as_input = poisoned(2, 3), poisoned(2, 3)
    kernels.weight_gradients(a, b, [terms], [as_gradient])
    kernels.input_gradients(a.mT.contiguous(), [2], [b], as_input)
    assert torch.equal(as_gradient, want) and torch.equal(as_input, want)


def test_a_product_is_native_with_a_gradient_and_without(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, want = noise(3, 8).requires_grad_(), noise(4, 8, seed=1).requires_grad_(), poisoned(3, 4)
    kernels.linear(x.detach(), weight.detach(), want)
    assert type(linear(x, weight).grad_fn).__name__ == "_LinearBackward" and torch.equal(linear(x, weight), want)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), want)
    monkeypatch.setattr(backends, "native_module", lambda: None)
    assert type(linear(x, weight).grad_fn).__name__ != "_LinearBackward"


@pytest.mark.parametrize("wanted", [[True, False], [False, True]])
def test_only_requested_gradients_are_computed(rung: str, wanted: list[bool]) -> None:
    leaves = [t.requires_grad_(w) for t, w in zip((noise(9, 21), noise(18, 21, seed=1)), wanted, strict=True)]
    linear(leaves[0], leaves[1]).backward(noise(9, 18, seed=7))
    assert [leaf.grad is not None for leaf in leaves] == wanted


def test_no_rows_give_a_gradient_of_zero(rung: str) -> None:
    empty, weight = noise(0, 3).requires_grad_(), noise(4, 3).requires_grad_()
    linear(empty, weight).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 3)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(4, 3))
