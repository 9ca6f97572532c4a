"""NaN reaches results and gradients natively as in the reference, and no further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention import attend
from dsv4.kernels.compressor import compress
from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.mhc import hc_head, hc_pre
from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8, fake_quant_fp8_blocks
from dsv4.kernels.router import route_by_score
from dsv4.kernels.sinkhorn import sinkhorn
from dsv4.kernels.swiglu import clamped_swiglu

from .test_gradients import Documents
from .test_mhc import Sizes
from .tools import noise, poisoned

NAN, INF = float("nan"), float("inf")
Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Places:
    """Compares where results and gradients are NaN, natively and on the reference."""

    monkeypatch: pytest.MonkeyPatch

    def check(self, run: Run, leaves: Sequence[Tensor]) -> None:
        native = self._places(run, leaves)
        with self.monkeypatch.context() as patch:
            patch.setattr(backends, "native_module", lambda: None)
            wanted = self._places(run, leaves)
        assert any(want.any() for want in wanted), "the case tests something"
        for number, (got, want) in enumerate(zip(native, wanted, strict=True)):
            assert torch.equal(got, want), f"result or gradient {number}: {got.sum()} NaN, the reference {want.sum()}"

    def _places(self, run: Run, leaves: Sequence[Tensor]) -> list[Tensor]:
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        results = run(*inputs)
        grads = torch.autograd.grad(results, inputs, [noise(*result.shape, seed=9) for result in results])
        return [value.detach().isnan() for value in (*results, *grads)]


@pytest.fixture
def places(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(monkeypatch)


def with_nan(x: Tensor, *place: int) -> Tensor:
    x = x.clone()
    x[place] = NAN
    return x


def test_exp(kernels: Any) -> None:
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)
    for lane in range(16):
        for value in bits.view(torch.float32):
            x = torch.linspace(-90.0, 90.0, 35)
            want, y = poisoned(35), poisoned(35)
            kernels.exp(x, want)
            x[lane], x[-1] = value, value
            kernels.exp(x, y)
            want[lane], want[-1] = NAN, NAN
            assert torch.equal(y.nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("streams", [1, 3, 4, 5])
def test_sinkhorn(rung: str, streams: int) -> None:
    for place in range(streams**2):
        logits = noise(3, streams, streams)
        logits[1].view(-1)[place] = NAN
        assert torch.equal(sinkhorn(logits, 4, 1e-6).isnan().flatten(1).all(1), torch.tensor([False, True, False]))
        assert sinkhorn(logits, 4, 1e-6)[::2].isfinite().all()


# Streams of one token, a row of fn, a scale, and a base of each of pre, post and comb.
@pytest.mark.parametrize("place", [(0, 17, 2, 5), (1, 3, 9), (2, 0), (2, 2), (3, 1), (3, 5), (3, 20)])
def test_reads_of_the_streams(places: Places, place: tuple[int, ...]) -> None:
    leaves = [noise(19, 4, 24), noise(24, 96, seed=1), noise(3, seed=2), noise(24, seed=3), noise(24, seed=4)]
    leaves[place[0]] = with_nan(leaves[place[0]], *place[1:])
    places.check(lambda *x: hc_pre(*x, Sizes(4)), leaves)


@pytest.mark.parametrize("place", [(0, 17, 2, 5), (1, 3, 9), (2, 0), (3, 1)])
def test_read_out_of_the_streams(places: Places, place: tuple[int, ...]) -> None:
    leaves = [noise(19, 4, 24), noise(4, 96, seed=1), noise(1, seed=2), noise(4, seed=3)]
    leaves[place[0]] = with_nan(leaves[place[0]], *place[1:])
    places.check(lambda *x: [hc_head(*x, Sizes(4))], leaves)


def test_an_infinite_scale_leaves_the_gradients_of_the_bases_finite(kernels: Any) -> None:
    """Of fewer than 16 tokens the kernel computes 16: zero times the scale must not count."""
    site = noise(24, 96, seed=1), torch.tensor([1.0, INF, 1.0]), noise(24, seed=3).requires_grad_(), noise(24, seed=4)
    x, post, comb = hc_pre(noise(3, 4, 24), *site, Sizes(4))
    (slope,) = torch.autograd.grad((x.sum() + post.sum() + comb.square().sum()), site[2])
    assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize(("ratio", "top_k"), [(0, 0), (4, 8), (128, 0)])
@pytest.mark.parametrize("place", [(0, 40, 1, 3), (2, 1)])  # a token's query, a head's sink
def test_attention(places: Places, ratio: int, top_k: int, place: tuple[int, ...]) -> None:
    case = Documents(None, (200,), ratio, top_k)
    layout = case.layout
    chosen = case.chosen(layout)

    def run(q: Tensor, new: Tensor, sink: Tensor, entries: Tensor) -> list[Tensor]:
        return [attend(q, case.keys(layout, new, entries), case.tiles(layout), sink, chosen)[0]]

    leaves = [noise(200, 3, 16), noise(200, 16, seed=1), noise(3, seed=2), noise(case.entries, 16, seed=3)]
    leaves[place[0]] = with_nan(leaves[place[0]], *place[1:])
    # Not the keys' gradients: of hidden keys, by the contract, the reference makes zero times NaN.
    places.check(lambda q, sink: run(q, leaves[1], sink, leaves[3]), [leaves[0], leaves[2]])


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("score", [False, True])
def test_compressor(places: Places, ratio: int, score: bool) -> None:
    case = Documents(None, (300, 5), ratio)
    layout = case.layout
    total = 2 * 20 if ratio == 4 else 20

    def run(kv: Tensor, score: Tensor, ape: Tensor) -> list[Tensor]:
        made = compress(kv, score, ape, case.windows(layout))
        assert made is not None
        return [made]

    leaves = [noise(case.tokens, total), noise(case.tokens, total, seed=1), noise(ratio, total, seed=2)]
    for token in (0, 3, 4, 127, 128, 255):
        broken = [leaf.clone() for leaf in leaves]
        broken[int(score)][token, 17] = NAN
        places.check(run, broken)


@pytest.mark.parametrize("place", [(0, 1, 5), (0, 1, 36), (1, 0, 16), (2, 2, 0)])
def test_swiglu(places: Places, place: tuple[int, ...]) -> None:
    leaves = [noise(3, 37, scale=2.0), noise(3, 37, seed=1, scale=2.0), noise(3, 1, seed=2)]
    leaves[place[0]] = with_nan(leaves[place[0]], *place[1:])
    places.check(lambda gate, up, weight: [clamped_swiglu(gate, up, 2.5, weight)], leaves)


def test_a_score_of_an_expert_that_is_not_chosen(places: Places) -> None:
    places.check(lambda x: [route_by_score(x, torch.zeros(5), 4, 1.0)[2]], [with_nan(noise(3, 5), 1, 2)])


@pytest.mark.parametrize("vocab", [32, 40])
def test_cross_entropy(places: Places, vocab: int) -> None:
    """A row of the head spoils all losses. The first NaN counts as the largest logit, as for torch."""
    x, targets = noise(5, 24), torch.arange(5)
    for tokens in ([0], [15], [16], [vocab - 1], [vocab - 1, 17], list(range(vocab))):
        weight = noise(vocab, 24, seed=1)
        weight[tokens] = NAN
        loss, predicted = cross_entropy(x, weight, targets)
        assert loss.isnan() and predicted.tolist() == [min(tokens)] * 5
        places.check(lambda *leaves: [cross_entropy(*leaves, targets)[0]], [x, weight])
    row = with_nan(x, 2, 3)
    assert cross_entropy(row, noise(vocab, 24, seed=1), targets)[1][2] == 0
    places.check(lambda *leaves: [cross_entropy(*leaves, targets)[0]], [row, noise(vocab, 24, seed=1)])


@pytest.mark.parametrize("vocab", [32, 40])
def test_cross_entropy_of_infinite_logits(places: Places, vocab: int) -> None:
    x, targets = torch.ones(1, 1), torch.tensor([3])
    for weight, first in (
        (torch.full((vocab, 1), -INF), 0),
        (torch.full((vocab, 1), INF), 0),
        (torch.where(torch.arange(vocab)[:, None] == 20, INF, noise(vocab, 1)), 20),
    ):
        loss, predicted = cross_entropy(x, weight, targets)
        assert loss.isnan() and predicted.tolist() == [first]
        places.check(lambda *leaves: [cross_entropy(*leaves, targets)[0]], [x, weight])
    finite = torch.where(torch.arange(vocab)[:, None] % 2 == 0, -INF, noise(vocab, 1))
    assert cross_entropy(x, finite, targets)[0].isfinite()


@pytest.mark.parametrize(("quantize", "block"), [(lambda x: fake_quant_fp8(x, 32), 32), (fake_quant_fp4, 32)])
def test_fake_quantization(rung: str, quantize: Callable[[Tensor], Tensor], block: int) -> None:
    """Whatever the bits of a NaN; an infinite number takes its block with it."""
    bits = [0x7FC00000, 0x7F800001, 0x7FF80001, 0x7FFF0000, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF]
    x = noise(len(bits), 3 * block)
    whole = quantize(x)
    x.view(torch.int32)[:, block + 5] = torch.tensor(bits, dtype=torch.int32)
    got = quantize(x)
    assert got[:, block + 5].isnan().all()
    for sign in (-1.0, 1.0):
        x[:, block + 5] = sign * INF
        got = quantize(x)
        assert got[:, block : 2 * block].isnan().all()
        for part in (slice(0, block), slice(2 * block, None)):
            assert torch.equal(got[:, part], whole[:, part])


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_fake_quantization_of_a_weight(value: float) -> None:
    weight = noise(130, 200)
    whole = fake_quant_fp8_blocks(weight)
    weight[3, 150] = value
    got = fake_quant_fp8_blocks(weight)
    assert got[:128, 128:].isnan().all()
    assert torch.equal(got[:, :128], whole[:, :128]) and torch.equal(got[128:], whole[128:])
