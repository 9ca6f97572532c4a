"""mHC: every rung of the reads and writes against the formula in float64; gradients of the wide maps."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.mhc import hc_post, hc_pre
from dsv4.kernels.mhc.reference import collect, distribute, mixes

from .test_sinkhorn import formula as sinkhorn
from .tools import check_derivatives, near, noise, same, set_threads


@dataclass(frozen=True)
class Sizes:
    hc_mult: int
    hc_sinkhorn_iters: int = 20
    rms_norm_eps: float = 1e-6
    hc_eps: float = 1e-6


SHAPES = [(1, 4, 64), (2, 4, 129), (3, 1, 7), (9, 2, 33), (70, 3, 40), (5, 16, 20)]  # tokens, streams, hidden


def site(streams: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fn, scale, base and the norm's weight."""
    count = streams * (2 + streams)
    return noise(count, streams * hidden, seed=1), noise(3, seed=3), noise(count, seed=4), 1 + noise(hidden, seed=2)


@pytest.mark.parametrize(("tokens", "streams", "hidden"), SHAPES)
def test_read(rung: str, tokens: int, streams: int, hidden: int) -> None:
    sizes, x = Sizes(streams), noise(tokens, streams, hidden)
    fn, scale, base, norm = (t.double() for t in site(streams, hidden))
    flat = x.double().flatten(1)
    mix = (flat @ fn.mT) * (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    pre, post, comb = mix.split((streams, streams, streams**2), 1)
    offsets = base.split((streams, streams, streams**2))
    pre, post = (pre * scale[0] + offsets[0]).sigmoid() + 1e-6, 2 * (post * scale[1] + offsets[1]).sigmoid()
    comb = sinkhorn((comb * scale[2] + offsets[2]).view(-1, streams, streams), 20, 1e-6)
    y = torch.einsum("ts,tsd->td", pre, x.double())
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm
    got = hc_pre(x, *site(streams, hidden), sizes)
    for ours, exact in zip(got, (y, post, comb), strict=True):
        assert near(ours, exact.float(), 2e-5)


@pytest.mark.parametrize(("tokens", "streams", "hidden"), SHAPES)
def test_a_tokens_read_depends_on_it_alone(rung: str, tokens: int, streams: int, hidden: int) -> None:
    x, sizes = noise(tokens, streams, hidden), Sizes(streams)
    whole = hc_pre(x, *site(streams, hidden), sizes)
    for threads in (1, 2, 3):
        set_threads(rung, threads)
        for part in (slice(0, 1), slice(tokens // 2, tokens), slice(0, tokens)):
            got = hc_pre(x[part], *site(streams, hidden), sizes)
            if rung == "reference":  # MKL's rows are independent in its strict mode only
                assert all(near(a, b[part], 1e-5) for a, b in zip(got, whole, strict=True))
            else:
                assert same(got, [t[part] for t in whole])


@pytest.mark.parametrize(("tokens", "streams", "hidden"), SHAPES)
def test_write(rung: str, tokens: int, streams: int, hidden: int) -> None:
    y, x = noise(tokens, hidden, seed=5), noise(tokens, streams, hidden)
    kept, post, comb = x.clone(), noise(tokens, streams, seed=6), noise(tokens, streams, streams, seed=7)
    got = hc_post(y, x, post, comb)
    exact = torch.einsum("ts,td->tsd", post.double(), y.double())
    exact += torch.einsum("tjk,tjd->tkd", comb.double(), x.double())
    assert near(got, exact.float())
    assert torch.equal(hc_post(y[-1:], x[-1:], post[-1:], comb[-1:]), got[-1:])
    assert torch.equal(x, kept), "the streams stay"


def test_too_many_streams_for_the_native_rung_are_reported(rung: str) -> None:
    x = noise(2, 17, 8)
    if rung == "reference":
        assert hc_pre(x, *site(17, 8), Sizes(17))[0].shape == (2, 8)
        return
    with pytest.raises(backends.KernelChoiceError, match="the model has 17 streams, the native kernels take 16"):
        hc_pre(x, *site(17, 8), Sizes(17))


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_gradients_of_the_mixes(tokens: int) -> None:
    check_derivatives(
        lambda x, fn: mixes(x, fn, 1e-6),
        lambda x, fn: (x.flatten(1) @ fn.mT) * (x.flatten(1).square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
        (noise(tokens, 4, 24), noise(9, 96, seed=1)),
    )


@pytest.mark.parametrize("tokens", [1, 5])
def test_gradients_of_collect_and_distribute(tokens: int) -> None:
    streams, y = noise(tokens, 3, 17), noise(tokens, 17, seed=1)
    weights, comb = noise(tokens, 3, seed=2), noise(tokens, 3, 3, seed=3)
    check_derivatives(collect, lambda w, s: torch.einsum("ts,tsd->td", w, s), (weights, streams))
    check_derivatives(
        distribute,
        lambda y, s, post, comb: torch.einsum("ts,td->tsd", post, y) + torch.einsum("tjk,tjd->tkd", comb, s),
        (y, streams, weights, comb),
    )


def test_mixes_of_zero_streams_are_zero() -> None:
    assert torch.equal(mixes(torch.zeros(2, 4, 8), noise(3, 32), 1e-6), torch.zeros(2, 3))


def test_stream_maps_keep_bfloat16() -> None:
    streams, weights = noise(4, 3, 8).bfloat16(), noise(4, 3, seed=1)
    assert collect(weights, streams).dtype == torch.bfloat16
    assert distribute(streams[:, 0], streams, weights, noise(4, 3, 3)).dtype == torch.bfloat16
    assert mixes(streams, noise(2, 24), 1e-6).dtype == torch.float32
