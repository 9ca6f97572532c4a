"""Grouped linear: every rung against float64, odd groups; gradients, weights as stored, a whole model's gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.checkpoint import formats
from dsv4.kernels import backends
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.linear import linear
from dsv4.kernels.stored import StoredStack, StoredTensor, widen_bf16
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, random_model, tiny_config
from .tools import check_derivatives, noise, poisoned, same

# Rows of each group, inputs, outputs.
CASES = [
    ([1], 1, 1),
    ([0], 5, 3),
    ([7], 33, 17),
    ([300], 40, 24),
    ([530], 19, 290),
    ([3], 270, 600),
    ([3, 0, 5, 1], 13, 7),
    ([0, 0, 9, 0], 48, 31),
    ([1, 290, 0, 26], 65, 130),
]


def close(got: Tensor, want: Tensor, terms: int) -> bool:
    """Equal up to the rounding of `terms` additions, with every element written."""
    scale = want.abs().max() if want.numel() else 0.0
    return got.shape == want.shape and bool(((got - want).abs() <= 4e-7 * max(terms, 1) ** 0.5 * scale).all())


def results(kernels: Any, x: Tensor, dy: Tensor, sizes: list[int], weights: list[Any]) -> list[Tensor]:
    """y, dx, then every weight's gradient, in memory filled with NaN before."""
    outputs, inputs = dy.shape[1], x.shape[1]
    y, dx = poisoned(len(x), outputs), poisoned(len(x), inputs)
    gradients = [poisoned(outputs, inputs) for _ in sizes]
    kernels.grouped_linear(x, sizes, weights, y)
    kernels.input_gradients(dy, sizes, weights, dx)
    kernels.weight_gradients(dy, x, sizes, gradients)
    return [y, dx, *gradients]


@pytest.mark.parametrize(("sizes", "inputs", "outputs"), CASES)
def test_products_and_gradients_of_odd_groups(kernels: Any, sizes: list[int], inputs: int, outputs: int) -> None:
    x, dy = noise(sum(sizes), inputs), noise(sum(sizes), outputs, seed=1)
    weights = [noise(outputs, inputs, seed=2 + group) for group in range(len(sizes))]
    kernels.set_threads(1)
    found = results(kernels, x, dy, sizes, weights)
    y, dx, *gradients = found
    parts = zip(weights, gradients, *(t.split(sizes) for t in (x, dy, y, dx)), strict=True)
    for weight, gradient, x_part, dy_part, y_part, dx_part in parts:
        w, xs, dys = weight.double(), x_part.double(), dy_part.double()
        assert close(y_part, xs @ w.mT, inputs)
        assert close(dx_part, dys @ w, outputs)
        assert close(gradient, dys.mT @ xs, len(xs)), "zero where a group has no rows"

    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        assert same(results(kernels, x, dy, sizes, weights), found), "threads change no bit, nor does another run"
    wide = [torch.cat((t, t), dim=1)[:, : t.shape[1]] for t in (x, dy, *weights)]
    assert same(results(kernels, wide[0], wide[1], sizes, wide[2:]), found), "nor does the layout"


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [1, 1, 1, 6]])
def test_gradients(rung: str, sizes: list[int]) -> None:
    def kernel(x: Tensor, weights: Tensor) -> Tensor:
        return grouped_linear(x, sizes, weights)

    def formula(x: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([part @ w.mT for part, w in zip(x.split(sizes), weights, strict=True)])

    check_derivatives(kernel, formula, (noise(9, 13), noise(4, 7, 13, seed=1)))


@pytest.mark.parametrize("wanted", [[True, False], [False, True], [True, True]])
def test_only_requested_gradients_are_computed(rung: str, wanted: list[bool]) -> None:
    x, weights = (t.requires_grad_(w) for t, w in zip((noise(9, 21), noise(2, 18, 21, seed=1)), wanted, strict=True))
    grouped_linear(x, [4, 5], weights).backward(noise(9, 18, seed=7))
    assert [x.grad is not None, weights.grad is not None] == wanted


def test_a_group_without_rows_is_not_read_and_its_gradient_is_zero(rung: str) -> None:
    x, weights = noise(2, 3).requires_grad_(), noise(3, 4, 3, seed=1)
    weights[::2] = float("nan")
    out = grouped_linear(x, [0, 2, 0], weights.requires_grad_())
    out.sum().backward()  # a gradient expanded from one number
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert weights.grad is not None and [bool(g.any()) for g in weights.grad] == [False, True, False]


def halves(x: Tensor, weights: Tensor) -> Tensor:
    return grouped_linear(x, [2, 3], weights)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
def test_an_input_of_a_stored_weight_gets_the_widened_weights_gradient(rung: str, kind: str) -> None:
    values = noise(160, 64)
    if kind == "bf16":
        stored = StoredTensor("bf16", values.bfloat16(), None, widen_bf16)
    elif kind == "fp8":
        stored = StoredTensor("fp8", *formats.quantize_fp8(values), formats.dequantize_fp8)
    else:
        stored = StoredTensor("fp4", *formats.quantize_fp4(values), formats.dequantize_fp4)
    plain = stored.widen()
    cases = ((linear, stored, plain), (halves, StoredStack([stored, stored]), torch.stack([plain, plain])))
    for op, kept, widened in cases:
        gradients = []
        for weight in (kept, widened):
            x = noise(5, 64).requires_grad_()
            op(x, weight).backward(noise(5, 160, seed=7))
            assert x.grad is not None
            gradients.append(x.grad)
        assert torch.equal(*gradients)


def test_other_dtypes_take_the_reference(rung: str) -> None:
    x, weight = noise(3, 8).requires_grad_(), noise(4, 8, seed=1).requires_grad_()
    for dtype in (torch.float64, torch.bfloat16):
        assert grouped_linear(x.to(dtype), [3], weight.to(dtype)[None]).dtype == dtype


def test_mismatched_arguments_are_refused(kernels: Any) -> None:
    x, y, w = noise(5, 3), poisoned(5, 4), noise(4, 3)
    with pytest.raises(ValueError, match="sizes add up to 4 rows, x has 5, y 5"):
        kernels.grouped_linear(x, [2, 2], [w, w], y)
    with pytest.raises(ValueError, match="1 weights for 2 groups"):
        kernels.grouped_linear(x, [2, 3], [w], y)
    with pytest.raises(ValueError, match=r"weight: shape \[3, 4\], expected \[4, 3\]"):
        kernels.input_gradients(y, [5], [w.mT.contiguous()], x)
    with pytest.raises(ValueError, match=r"gradient: shape \[3, 4\], expected \[4, 3\]"):
        kernels.weight_gradients(y, x, [5], [poisoned(3, 4)])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_models_gradients_match_the_reference(kernels: Any, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations of a training step, forward and backward."""
    config = tiny_config()
    model, ids = random_model(config).requires_grad_(), random_ids(config, 2, 150)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def gradients(model: Transformer) -> dict[str, Tensor | None]:
        model.zero_grad()
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    got, again = gradients(model), gradients(model)
    monkeypatch.setattr(backends, "native_module", lambda: None)
    want = gradients(model)
    for name, gradient in want.items():
        ours, once_more = got[name], again[name]
        assert (ours is None) == (gradient is None), name
        if gradient is not None and ours is not None and once_more is not None:
            assert torch.equal(ours, once_more), name
            assert (ours - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name
