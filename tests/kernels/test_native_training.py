"""Products that training differentiates, native: forward and gradients against float64 and the reference, odd sizes."""

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.checkpoint import formats
from dsv4.kernels import backends
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.grouped_linear import reference as grouped_reference
from dsv4.kernels.linear import linear
from dsv4.kernels.linear import reference as linear_reference
from dsv4.kernels.stored import StoredStack, StoredTensor, widen_bf16
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, random_model, tiny_config
from .derivatives import check_derivatives, noise

MODULE = backends.native_module()
pytestmark = pytest.mark.skipif(MODULE is None, reason="the native kernels are not built")
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


@pytest.fixture
def kernels(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As with DSV4_KERNELS=native."""
    monkeypatch.setattr(backends, "requested", lambda: True)
    return kernels


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def close(got: Tensor, want: Tensor, terms: int) -> bool:
    """Equal but for the rounding of so many additions; nothing unwritten."""
    scale = want.abs().max() if want.numel() else 0.0
    return got.shape == want.shape and bool(((got - want).abs() <= 4e-7 * max(terms, 1) ** 0.5 * scale).all())


def results(kernels: Any, x: Tensor, dy: Tensor, sizes: list[int], weights: list[Any]) -> list[Tensor]:
    """y, dx, then every weight's gradient, written over NaN."""
    outputs, inputs = dy.shape[1], x.shape[1]
    y, dx = poisoned(len(x), outputs), poisoned(len(x), inputs)
    gradients = [poisoned(outputs, inputs) for _ in sizes]
    kernels.grouped_linear(x, sizes, weights, y)
    kernels.input_gradients(dy, sizes, weights, dx)
    kernels.weight_gradients(dy, x, sizes, gradients)
    return [y, dx, *gradients]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(("sizes", "inputs", "outputs"), CASES)
def test_products_and_gradients(kernels: Any, sizes: list[int], inputs: int, outputs: int) -> None:
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


@pytest.mark.parametrize("rows", [13, 300])
def test_a_row_of_the_gradient_depends_on_that_row_alone(kernels: Any, rows: int) -> None:
    kernels.set_threads(2)
    dy, weight, dx = noise(rows, 290), noise(290, 50, seed=1), poisoned(rows, 50)
    kernels.input_gradients(dy, [rows], [weight], dx)
    for first, count in ((0, 1), (rows - 1, 1), (5, 7), (2, rows - 2)):
        alone = poisoned(count, 50)
        kernels.input_gradients(dy[first : first + count], [count], [weight], alone)
        assert torch.equal(alone, dx[first : first + count])


def test_the_order_of_the_sums(kernels: Any) -> None:
    """As docs/kernels.md has it: chains of 256 terms from zero, ascending, their sums added in order."""
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 40, 17), (9, 13, 70), (301, 31, 33)])
def test_linear_differentiates(kernels: Any, rows: int, inputs: int, outputs: int, threads: int) -> None:
    kernels.set_threads(threads)
    check_derivatives(linear, lambda x, w: x @ w.mT, (noise(rows, inputs), noise(outputs, inputs, seed=1)))
    check_derivatives(
        lambda x, w: linear(x.mT, w), lambda x, w: x.mT @ w.mT, (noise(inputs, rows), noise(outputs, inputs, seed=1))
    )
    check_derivatives(linear, lambda x, w: x @ w.mT, (noise(2, rows, inputs), noise(outputs, inputs, seed=1)))


def test_training_takes_them_where_they_are_asked_for(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = noise(3, 8).requires_grad_(), noise(4, 8, seed=1).requires_grad_()

    def names() -> list[str]:
        return [type(y.grad_fn).__name__ for y in (linear(x, weight), grouped_linear(x, [3], weight[None]))]

    asked = names()
    monkeypatch.setattr(backends, "requested", lambda: False)
    assert asked[0] == "_LinearBackward" != names()[0]
    assert all(name == "_GroupedLinearBackward" for name in (asked[1], names()[1]))
    with torch.no_grad():
        want = poisoned(3, 4)
        kernels.linear(x.detach(), weight.detach(), want)
        assert torch.equal(linear(x, weight), want), "without gradient a product is native anyhow"


def gradients_of(op: Callable[..., Tensor], inputs: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_(wants) for t, wants in zip(inputs, wanted, strict=True)]
    out = op(*leaves)
    out.backward(noise(*out.shape, seed=7))
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("wanted", [[True, False], [False, True], [True, True]])
def test_only_what_is_wanted_gets_a_gradient(kernels: Any, wanted: list[bool]) -> None:
    sizes, x, stack, weight = [4, 5], noise(9, 21), noise(2, 18, 21, seed=1), noise(18, 21, seed=2)
    got = gradients_of(lambda x, w: grouped_linear(x, sizes, w), [x, stack], wanted)
    want = gradients_of(lambda x, w: grouped_reference.grouped_linear(x, sizes, w), [x, stack], wanted)
    got += gradients_of(linear, [x, weight], wanted)
    want += gradients_of(linear_reference.linear, [x, weight], wanted)
    for a, b, wants in zip(got, want, [*wanted, *wanted], strict=True):
        assert (a is not None) == wants
        assert a is None or (b is not None and close(a, b, 21))


def test_a_group_without_rows_is_not_read_and_no_rows_give_zero(kernels: Any) -> None:
    x, weights = noise(2, 3).requires_grad_(), noise(3, 4, 3, seed=1)
    weights[::2] = float("nan")
    out = grouped_linear(x, [0, 2, 0], weights.requires_grad_())
    out.sum().backward()  # a gradient that is one number, expanded
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert weights.grad is not None and [bool(g.any()) for g in weights.grad] == [False, True, False]
    empty, weight = noise(0, 3).requires_grad_(), noise(4, 3).requires_grad_()
    linear(empty, weight).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 3)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(4, 3))


def grouped(x: Tensor, weights: Tensor) -> Tensor:
    return grouped_linear(x, [2, 3], weights)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
def test_an_input_of_a_stored_weight_gets_the_widened_weights_gradient(kernels: Any, kind: str) -> None:
    values = noise(160, 64)
    if kind == "bf16":
        stored = StoredTensor("bf16", values.bfloat16(), None, widen_bf16)
    elif kind == "fp8":
        stored = StoredTensor("fp8", *formats.quantize_fp8(values), formats.dequantize_fp8)
    else:
        stored = StoredTensor("fp4", *formats.quantize_fp4(values), formats.dequantize_fp4)
    plain = stored.widen()
    cases = ((linear, stored, plain), (grouped, StoredStack([stored, stored]), torch.stack([plain, plain])))
    for op, kept, widened in cases:
        (got,) = gradients_of(lambda x, op=op, w=kept: op(x, w), [noise(5, 64)], [True])
        (want,) = gradients_of(lambda x, op=op, w=widened: op(x, w), [noise(5, 64)], [True])
        assert got is not None and want is not None and torch.equal(got, want)


def test_autocast_and_other_numbers_take_the_reference(kernels: Any) -> None:
    x, weight = noise(3, 8).requires_grad_(), noise(4, 8, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        assert grouped_linear(x.to(dtype), [3], weight.to(dtype)[None]).dtype == dtype


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
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
def test_a_models_gradients_are_the_references(kernels: Any, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
