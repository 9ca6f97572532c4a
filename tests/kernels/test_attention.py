"""The attention kernel against one dense softmax in float64, in its three forms of entries."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.attention.reference import attend_tiles

from .derivatives import noise

FORMS = ["none", "shared", "a tile's own", "a row's own"]


def masks(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def case(form: str, G: int, R: int, H: int, D: int, E: int) -> dict[str, Any]:
    W = 192
    inputs: dict[str, Any] = {
        "q": noise(G, R, H, D, seed=1, scale=2.0),
        "window": noise(G, W, D, seed=2),
        "window_mask": masks(G, R, W, seed=3),
        "sink": noise(H, seed=4),
    }
    if form != "none":
        lead = {"shared": (), "a tile's own": (G,), "a row's own": (G, R)}[form]
        inputs |= {"entries": noise(*lead, E, D, seed=5), "entry_mask": masks(G, R, E, seed=6)}
    return inputs


def dense(
    q: Tensor,
    window: Tensor,
    window_mask: Tensor,
    sink: Tensor,
    entries: Tensor | None = None,
    entry_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [G, R, H, D], probabilities of the entries, heads summed [G, R, E])."""
    G, R, H, D = q.shape
    keys, mask = window[:, None].expand(-1, R, -1, -1), window_mask
    if entries is not None and entry_mask is not None:
        missing = (None,) * (4 - entries.dim())
        own = entries[missing] if entries.dim() == 2 else entries[:, None] if entries.dim() == 3 else entries
        keys, mask = torch.cat((keys, own.expand(G, R, -1, -1)), 2), torch.cat((window_mask, entry_mask), -1)
    scores = torch.einsum("grhd,grkd->grhk", q, keys) / D**0.5
    scores = torch.where(mask[:, :, None], scores, torch.full_like(scores, float("-inf")))
    scores = torch.cat((scores, sink[:, None].expand(G, R, H, 1)), -1)
    p = torch.softmax(scores, -1)[..., :-1]
    return torch.einsum("grhk,grkd->grhd", p, keys), p.sum(2)[..., window.shape[1] :]


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("G", "R", "H", "D"), [(1, 1, 1, 8), (3, 5, 2, 24), (2, 64, 3, 10)])
def test_output_and_probabilities(form: str, G: int, R: int, H: int, D: int) -> None:
    inputs = case(form, G, R, H, D, E=13 if form == "a row's own" else 128)
    out, probs = attend_tiles(**inputs, return_entry_probs=True)
    want, want_probs = dense(**doubled(inputs))
    assert (out - want).abs().max() < 2e-6
    if form == "none":
        assert probs is None
    else:
        assert probs is not None and (probs - want_probs).abs().max() < 2e-6
        assert attend_tiles(**inputs)[1] is None


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str) -> None:
    inputs = case(form, 2, 3, 2, 12, E=7 if form == "a row's own" else 64)
    names = [n for n, x in inputs.items() if x.is_floating_point()]
    ours = inputs | {n: inputs[n].clone().requires_grad_() for n in names}
    theirs = inputs | {n: inputs[n].double().requires_grad_() for n in names}
    pull = noise(2, 3, 2, 12, seed=9)
    got = torch.autograd.grad(attend_tiles(**ours)[0], [ours[n] for n in names], pull)
    want = torch.autograd.grad(dense(**theirs)[0], [theirs[n] for n in names], pull.double())
    for name, a, b in zip(names, got, want, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max(), name


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_sees_nothing_gives_zeros(form: str) -> None:
    inputs = case(form, 2, 4, 3, 16, E=64)
    inputs["window_mask"][1, 2] = False
    if form != "none":
        inputs["entry_mask"][1, 2] = False
    out, probs = attend_tiles(**inputs, return_entry_probs=True)
    assert torch.equal(out[1, 2], torch.zeros(3, 16))
    assert probs is None or torch.equal(probs[1, 2], torch.zeros(64))
    assert out.isfinite().all() and (out[0] != 0).all()


def test_entries_alone() -> None:
    inputs = case("shared", 1, 2, 2, 8, E=64)
    inputs["window_mask"][:] = False
    assert (attend_tiles(**inputs)[0] - dense(**doubled(inputs))[0]).abs().max() < 2e-6


def test_large_scores_do_not_overflow() -> None:
    inputs = case("shared", 1, 3, 2, 8, E=64)
    inputs["q"] = inputs["q"] * 1e4
    out = attend_tiles(**inputs)[0]
    assert out.isfinite().all()
    assert (out - dense(**doubled(inputs))[0]).abs().max() < 1e-3
    inputs["sink"] = torch.full((2,), 1e5)
    inputs["q"] = inputs["q"] * 1e-4
    assert torch.equal(attend_tiles(**inputs)[0], torch.zeros_like(out))


@pytest.mark.parametrize("form", ["shared", "a tile's own"])
def test_masked_entries_behind_change_no_bit(form: str) -> None:
    inputs = case(form, 2, 5, 2, 16, E=192)
    inputs["entry_mask"][..., 64:] = False
    short = inputs | {"entry_mask": inputs["entry_mask"][..., :64], "entries": inputs["entries"][..., :64, :]}
    assert torch.equal(attend_tiles(**inputs)[0], attend_tiles(**short)[0])


def test_bfloat16_stays_and_sums_in_fp32() -> None:
    inputs = case("shared", 1, 3, 2, 16, E=64)
    low = {n: x.bfloat16() if n in ("q", "window", "entries") else x for n, x in inputs.items()}
    out = attend_tiles(**low)[0]
    assert out.dtype == torch.bfloat16
    assert (out - dense(**doubled(low))[0]).abs().max() < 2**-8
