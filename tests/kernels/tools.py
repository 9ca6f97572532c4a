"""Helpers of the kernel tests: random and poisoned tensors, comparisons, gradients against the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4.kernels import backends


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int) -> Tensor:
    """NaN throughout, for memory that a kernel must write or may not read."""
    return torch.full(shape, float("nan"))


def near(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> bool:
    """Equal up to rounding, relative to the largest value of the result."""
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def set_threads(rung: str, count: int) -> None:
    """Set the threads of the native kernels, or for the reference torch's."""
    module = backends.native_module()
    if rung != "reference" and module is not None:
        module.set_threads(count)


def check_derivatives(
    kernel: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    """Compare output and all gradients (fp32) with the formula's in float64, relative to the largest; no-grad: same
    bits."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    got, want = kernel(*ours), formula(*theirs)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    pull = noise(*want.shape, seed=99)
    got_grads = torch.autograd.grad(got, ours, pull)
    want_grads = torch.autograd.grad(want, theirs, pull.double())
    for number, (a, b) in enumerate(zip(got_grads, want_grads, strict=True)):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"gradient of input {number}"
    with torch.no_grad():
        assert torch.equal(kernel(*inputs), got.detach())
