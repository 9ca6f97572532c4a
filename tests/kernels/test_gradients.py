"""Gradients of the native rungs on batches of documents: the reference's, the same bits on any threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.config import COMPRESSION_KINDS, WINDOW
from dsv4.kernels import backends
from dsv4.kernels.attention import ENTRY_CHUNK, EntryView, KeyView, StoredRows, Tiles, attend
from dsv4.kernels.compressor import Windows, compress
from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.hadamard import hadamard
from dsv4.kernels.index_loss import index_loss
from dsv4.kernels.indexer import select_entries
from dsv4.kernels.mhc import hc_head, hc_post, hc_pre
from dsv4.kernels.norm import rms_norm
from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8
from dsv4.kernels.rope import rotate, rotation
from dsv4.kernels.router import route_by_score, route_by_token
from dsv4.kernels.swiglu import clamped_swiglu
from dsv4.model.batch import Part, RaggedBatch
from dsv4.model.layout import Layout

from .tools import noise, poisoned, same

CPU = torch.device("cpu")
# Around the lengths at which windows of 4 and 128 tokens close, and several chunks of 64 tokens.
DOCUMENTS = [(1,), (3, 1), (4, 5, 7), (127, 128, 129), (36, 37, 300), (259, 2, 66, 512)]
# Parts of a batch: first position, and tokens of each document. Only the first one goes on from earlier processes.
PARTS = [
    (0, (5, 1)), (1, (1,)), (3, (1, 4)), (4, (5,)), (5, (300, 66)), (127, (1, 129)), (128, (128, 3)), (129, (2, 66, 5)),
    (300, (1,)), (300, (70, 127)),
]  # fmt: skip
BATCHES = [(None, lengths) for lengths in DOCUMENTS] + PARTS


class Comparison:
    """Runs a function on leaves with random pulls, natively and on the reference."""

    def __init__(self, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels, self.monkeypatch = kernels, monkeypatch

    def check(
        self, run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], tolerance: float = 2e-5
    ) -> list[Tensor]:
        """Compare results and gradients; returns the native ones."""
        self.monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        native = self._values(run, leaves, native=True)
        for threads in (2, 3):
            self.monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            assert same(self._values(run, leaves, native=True), native), f"{threads} threads"
        self.monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        wanted = self._values(run, leaves, native=False)
        for number, (got, want) in enumerate(zip(native, wanted, strict=True)):
            assert got.shape == want.shape
            largest = want.abs().max() if want.numel() else torch.zeros(())
            distance = (got - want).abs().max() if want.numel() else torch.zeros(())
            assert distance <= tolerance * largest + 1e-6, f"result or gradient {number}: {distance} of {largest}"
        return native

    def _values(self, run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], native: bool) -> list[Tensor]:
        decide = backends.uses_native

        def uses_native(operation: str, *tensors: Tensor | None) -> bool:
            chosen = decide(operation, *tensors)
            assert chosen or operation in ("sinkhorn", "topk"), f"{operation} has left the native rungs"
            return chosen

        with self.monkeypatch.context() as patch:
            if native:
                patch.setattr(backends, "uses_native", uses_native)
            else:
                patch.setattr(backends, "native_module", lambda: None)
            inputs = [leaf.clone().requires_grad_() for leaf in leaves]
            results = run(*inputs)
            pulls = [noise(*result.shape, seed=50 + i) for i, result in enumerate(results)]
            grads = torch.autograd.grad(results, inputs, pulls, materialize_grads=True)
        return [result.detach() for result in results] + list(grads)


@pytest.fixture
def comparison(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    return Comparison(kernels, monkeypatch)


@dataclass(frozen=True)
class Documents:
    """A batch of documents without a cache, in a layer of one ratio; top_k: entries per token, 0 without an indexer.

    start: None, or the batch is a part of another, and its first document begins at this position.
    """

    start: int | None
    lengths: tuple[int, ...]
    ratio: int
    top_k: int = 0

    @property
    def layout(self) -> Layout:
        batch = RaggedBatch.pack([[0] * n for n in self.lengths])
        if self.start is not None:
            batch = replace(batch, starts=self.starts, part=cast(Part, object()))
        return Layout(batch, None, CPU)

    @property
    def starts(self) -> np.ndarray:
        return np.array([self.start or 0] + [0] * (len(self.lengths) - 1))

    @property
    def ends(self) -> np.ndarray:
        return self.starts + self.lengths

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def entries(self) -> int:
        return int((self.ends // self.ratio).sum()) if self.ratio else 0

    @property
    def closing(self) -> int:
        """Windows that close in the batch."""
        return self.entries - int((self.starts // self.ratio).sum())

    def received(self, size: int, *widths: int) -> list[Tensor]:
        """Rows of `size` earlier tokens that a part gets from other processes; none of a whole batch."""
        return [noise(1, size, width, seed=70 + i) for i, width in enumerate(widths) if self.start is not None]

    def keys(self, layout: Layout, new: Tensor, entries: Tensor, *ring: Tensor) -> KeyView:
        view = self.view(layout, entries) if self.ratio else None
        return KeyView(new, layout.batch, StoredRows(ring[0]) if ring else None, layout.slots, view)

    def tiles(self, layout: Layout) -> Tiles:
        return layout.tiles(self.ratio, self.top_k, 1 << 20)

    def view(self, layout: Layout, entries: Tensor) -> EntryView:
        pool = torch.cat((entries, entries.new_zeros(ENTRY_CHUNK, entries.shape[1])))
        return EntryView(StoredRows(pool), self.ratio, layout.batch, None)

    def windows(self, layout: Layout, *state: Tensor) -> Windows:
        """The windows that close; state: kv and score of earlier tokens."""
        where, (kv, score) = layout.compression(self.ratio), state or (None, None)
        return Windows(
            self.ratio, layout.batch, layout.positions, where.source, kv, score, where.state_slots, where.state_row,
            where.state_token, writes_state=not state,
        )  # fmt: skip

    def chosen(self, layout: Layout) -> Tensor | None:
        """A choice by random scores."""
        if not self.top_k:
            return None
        keys = self.view(layout, noise(self.entries, 4, seed=31))
        queries = noise(self.tokens, 2, 4, seed=32), noise(self.tokens, 2, seed=33)
        return select_entries(*queries, keys, self.tiles(layout), self.top_k)[0]


@pytest.mark.parametrize(("start", "lengths"), BATCHES)
@pytest.mark.parametrize(
    ("ratio", "top_k", "heads", "width"), [(0, 0, 3, 20), (128, 0, 5, 24), (4, 8, 3, 40), (4, 8, 70, 16)]
)
def test_attention(
    comparison: Comparison,
    start: int | None,
    lengths: tuple[int, ...],
    ratio: int,
    top_k: int,
    heads: int,
    width: int,
) -> None:
    case = Documents(start, lengths, ratio, top_k)
    layout = case.layout
    chosen = case.chosen(layout)

    def run(q: Tensor, new: Tensor, sink: Tensor, entries: Tensor, *ring: Tensor) -> list[Tensor]:
        return [attend(q, case.keys(layout, new, entries, *ring), case.tiles(layout), sink, chosen)[0]]

    leaves = [noise(case.tokens, heads, width), noise(case.tokens, width, seed=1), noise(heads, seed=2)]
    comparison.check(run, [*leaves, noise(case.entries, width, seed=3), *case.received(WINDOW, width)])


def test_attention_with_a_large_sink_and_large_scores(comparison: Comparison) -> None:
    case = Documents(None, (200,), 4, 8)
    layout = case.layout
    chosen = case.chosen(layout)

    def run(q: Tensor, new: Tensor, sink: Tensor, entries: Tensor) -> list[Tensor]:
        return [attend(q, case.keys(layout, new, entries), case.tiles(layout), sink, chosen)[0]]

    leaves = [noise(200, 2, 16, scale=30.0), noise(200, 16, seed=1), torch.tensor([90.0, -90.0])]
    comparison.check(run, [*leaves, noise(case.entries, 16, seed=3)], 1e-4)


@pytest.mark.parametrize(("start", "lengths"), BATCHES)
@pytest.mark.parametrize(("top_k", "heads", "width"), [(8, 3, 20), (8, 70, 16), (0, 3, 20)])
def test_index_loss(
    comparison: Comparison, start: int | None, lengths: tuple[int, ...], top_k: int, heads: int, width: int
) -> None:
    """With no top_k the tokens read all entries, as in the first phases of training."""
    case = Documents(start, lengths, 4, top_k)
    layout = case.layout
    chosen, tiles = case.chosen(layout), case.tiles(layout)
    entries = noise(case.entries, 16, seed=3)
    keys = case.keys(layout, noise(case.tokens, 16, seed=1), entries, *case.received(WINDOW, 16))
    with torch.no_grad():
        _, probs = attend(noise(case.tokens, 2, 16), keys, tiles, noise(2), chosen, keep_probs=True)
    assert probs is not None

    def run(q: Tensor, weights: Tensor, entries: Tensor) -> list[Tensor]:
        loss = index_loss(q, weights, case.view(layout, entries), tiles, chosen, probs)
        return [loss if case.entries else loss + 0 * q.sum()]

    leaves = [noise(case.tokens, heads, width), noise(case.tokens, heads, seed=1, scale=0.1)]
    comparison.check(run, [*leaves, noise(case.entries, width, seed=2)], 5e-5)


@pytest.mark.parametrize(("start", "lengths"), BATCHES)
@pytest.mark.parametrize("top_k", [8, 0])
def test_probabilities_of_the_entries(
    kernels: Any, start: int | None, lengths: tuple[int, ...], top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Documents(start, lengths, 4, top_k)
    layout = case.layout
    entries = noise(case.entries, 16, seed=3)
    keys = case.keys(layout, noise(case.tokens, 16, seed=1), entries, *case.received(WINDOW, 16))
    inputs = noise(case.tokens, 3, 16), keys, case.tiles(layout), noise(3), case.chosen(layout), True
    out, got = attend(*inputs)
    assert torch.equal(out, attend(*inputs[:-1])[0])
    monkeypatch.setattr(backends, "native_module", lambda: None)
    want = attend(*inputs)[1]
    assert got is not None and want is not None and got.shape == want.shape
    assert (got - want).abs().max() <= 1e-6 * 3


@pytest.mark.parametrize(("start", "lengths"), BATCHES)
@pytest.mark.parametrize(("ratio", "width"), [(4, 20), (128, 33)])
def test_compressor(
    comparison: Comparison, start: int | None, lengths: tuple[int, ...], ratio: int, width: int
) -> None:
    case, kind = Documents(start, lengths, ratio), COMPRESSION_KINDS[ratio]
    layout = case.layout
    total = kind.channels(width)

    def run(kv: Tensor, score: Tensor, ape: Tensor, *state: Tensor) -> list[Tensor]:
        made = compress(kv, score, ape, case.windows(layout, *state))
        assert (made is None) == (case.closing == 0)
        return [made] if made is not None else [kv * 0]

    leaves = [noise(case.tokens, total), noise(case.tokens, total, seed=1), noise(ratio, total, seed=2)]
    comparison.check(run, [*leaves, *case.received(kind.state_tokens, total, total)])


@pytest.mark.parametrize("start", [1, 3, 4, 5, 127, 128, 129, 299])
@pytest.mark.parametrize(("ratio", "top_k"), [(0, 0), (128, 0), (4, 8), (4, 0)])
def test_a_part_has_the_bits_of_the_whole_document(kernels: Any, start: int, ratio: int, top_k: int) -> None:
    """Attention, probabilities and compression; hidden places of the received rows are not read."""
    case, part = Documents(None, (300,), ratio, top_k), Documents(start, (300 - start,), ratio, top_k)
    layout, own = case.layout, part.layout
    q, keys, sink = noise(300, 3, 16), noise(300, 16, seed=1), noise(3, seed=2)
    entries, chosen, learns = noise(case.entries, 16, seed=3), case.chosen(layout), ratio == 4

    def ring(rows: Tensor, size: int) -> Tensor:
        places = torch.arange(max(0, start - size + 1), start)
        received = poisoned(1, size, rows.shape[1])
        received[0, places % size] = rows[places]
        return received

    whole = attend(q, case.keys(layout, keys, entries), case.tiles(layout), sink, chosen, learns)
    view = part.keys(own, keys[start:], entries, ring(keys, WINDOW))
    picks = chosen[start:] if chosen is not None else None
    o, probs = attend(q[start:], view, part.tiles(own), sink, picks, learns)
    assert torch.equal(o, whole[0][start:])
    assert probs is None or (whole[1] is not None and torch.equal(probs, whole[1][start:]))
    if not ratio:
        return
    total, slots = COMPRESSION_KINDS[ratio].channels(16), COMPRESSION_KINDS[ratio].state_tokens
    kv, score, ape = noise(300, total, seed=4), noise(300, total, seed=5), noise(ratio, total, seed=6)
    made = compress(kv, score, ape, case.windows(layout))
    state = ring(kv, slots), ring(score + ape[torch.arange(300) % ratio], slots)
    rest = compress(kv[start:], score[start:], ape, part.windows(own, *state))
    assert made is not None and (rest is None) == (len(made) == start // ratio)
    assert rest is None or torch.equal(rest, made[start // ratio :])


@dataclass(frozen=True)
class Sizes:
    hc_mult: int
    hc_sinkhorn_iters: int = 20
    rms_norm_eps: float = 1e-6
    hc_eps: float = 1e-6


STREAMS = [(1, 4, 64), (2, 4, 129), (3, 1, 7), (9, 2, 33), (70, 3, 40), (131, 4, 48), (5, 16, 20)]


@pytest.mark.parametrize(("tokens", "streams", "hidden"), STREAMS)
def test_reads_of_the_streams(comparison: Comparison, tokens: int, streams: int, hidden: int) -> None:
    count, scale = streams * (2 + streams), (streams * hidden) ** -0.5
    site = [
        noise(count, streams * hidden, seed=1, scale=scale),
        noise(3, seed=3),
        noise(count, seed=4),
        1 + noise(hidden, seed=2),
    ]
    comparison.check(lambda *x: hc_pre(*x, Sizes(streams)), [noise(tokens, streams, hidden), *site], 1e-4)
    head = [noise(streams, streams * hidden, seed=1, scale=scale), noise(1, seed=3), noise(streams, seed=4)]
    comparison.check(lambda *x: [hc_head(*x, Sizes(streams))], [noise(tokens, streams, hidden), *head], 5e-5)


@pytest.mark.parametrize(("tokens", "streams", "hidden"), STREAMS)
def test_writes_to_the_streams(comparison: Comparison, tokens: int, streams: int, hidden: int) -> None:
    leaves = [noise(tokens, hidden), noise(tokens, streams, hidden, seed=1), noise(tokens, streams, seed=2)]
    comparison.check(lambda *x: [hc_post(*x)], [*leaves, noise(tokens, streams, streams, seed=3)])


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (130, 48), (3, 4, 20)])
def test_norm(comparison: Comparison, shape: tuple[int, ...]) -> None:
    comparison.check(lambda x, weight: [rms_norm(x, 1e-6, weight)], [noise(*shape), noise(shape[-1], seed=1)])
    comparison.check(lambda x: [rms_norm(x, 1e-6)], [noise(*shape)])


def test_rotation(comparison: Comparison) -> None:
    cos, sin = rotation(noise(6).abs(), torch.arange(9))
    comparison.check(lambda x: [rotate(x, cos, sin)], [noise(9, 21)])
    comparison.check(lambda x: [rotate(x, cos.unsqueeze(1), -sin.unsqueeze(1))], [noise(9, 3, 21)])


@pytest.mark.parametrize("n", [1, 7, 70])
def test_swiglu(comparison: Comparison, n: int) -> None:
    gate, up, weight = noise(n, 37, scale=2.0), noise(n, 37, seed=1, scale=2.0), noise(n, 1, seed=2)
    comparison.check(lambda *x: [clamped_swiglu(*x, 2.5)], [gate, up])
    comparison.check(lambda gate, up, weight: [clamped_swiglu(gate, up, 2.5, weight)], [gate, up, weight])


def test_router(comparison: Comparison) -> None:
    logits, bias = noise(70, 11, scale=3.0), noise(11, seed=1)
    comparison.check(lambda x: route_by_score(x, bias, 3, 1.5)[::2], [logits])
    comparison.check(lambda x: route_by_score(x, bias, 3, 1.5)[:1], [logits])
    table = torch.tensor([[0, 1, 2], [2, 2, 9], [10, 3, 10]])
    ids = torch.arange(70) % 3
    comparison.check(lambda x: route_by_token(x, table, ids, 1.5)[::2], [logits])


def test_a_router_logit_far_below_zero_has_a_finite_gradient(comparison: Comparison) -> None:
    logits = torch.tensor([[-300.0, 1.0, 2.0]], requires_grad=True)
    weights, _, scores = route_by_score(logits, torch.zeros(3), 2, 1.0)
    (slope,) = torch.autograd.grad(weights[0, 0] + scores.sum(), logits)
    assert slope.isfinite().all() and slope[0, 0] == 0


@pytest.mark.parametrize("numbers", [fake_quant_fp4, lambda x: fake_quant_fp8(x, 32), hadamard])
def test_shipped_numerics(comparison: Comparison, numbers: Callable[[Tensor], Tensor]) -> None:
    comparison.check(lambda x: [numbers(x)], [noise(5, 64)])


@pytest.mark.parametrize(("n", "width", "vocab"), [(1, 8, 5), (7, 33, 50), (300, 20, 131), (513, 16, 40)])
def test_cross_entropy(comparison: Comparison, n: int, width: int, vocab: int) -> None:
    targets = torch.arange(n) * 7 % vocab
    x, weight = noise(n, width), noise(vocab, width, seed=1)
    comparison.check(lambda *leaves: [cross_entropy(*leaves, targets)[0]], [x, weight])
    logits = x.double() @ weight.double().mT
    assert torch.equal(cross_entropy(x, weight, targets)[1], logits.argmax(-1))


def test_cross_entropy_of_large_logits_and_ties(comparison: Comparison) -> None:
    x, weight = torch.tensor([[300.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    loss, predicted = cross_entropy(x, weight, torch.tensor([2, 1]))
    assert predicted.tolist() == [0, 0]
    want = 600 + torch.tensor(2.0).log() + torch.tensor(3.0).log()
    assert (loss - want).abs() <= 1e-4


def test_cross_entropy_of_no_rows(comparison: Comparison) -> None:
    x, weight = torch.empty(0, 4, requires_grad=True), noise(5, 4).requires_grad_()
    loss, predicted = cross_entropy(x, weight, torch.empty(0, dtype=torch.int64))
    (slope,) = torch.autograd.grad(loss, weight)
    assert loss == 0 and len(predicted) == 0 and torch.equal(slope, torch.zeros(5, 4))


def test_wrong_arguments_are_errors(kernels: Any) -> None:
    with pytest.raises(ValueError, match=r"target 5: allowed are 0 to 4"):
        cross_entropy(noise(1, 4), noise(5, 4), torch.tensor([5]))
    x, lengths, starts = noise(3, 8), np.array([4]), np.array([0])
    with pytest.raises(ValueError, match="lengths add up to 4, expected 3"):
        kernels.compress_batch(128, x, x, lengths, starts, torch.empty(0, 8))
    q, none = noise(8, 1, 4), torch.full((8, 1), -1)
    with pytest.raises(ValueError, match="chosen entry -1: allowed are 0 to 1"):
        kernels.attend_batch(q, noise(8, 4), noise(2, 4), none, 4, 2 * lengths, starts, noise(1), noise(8, 1, 4))
    with pytest.raises(ValueError, match=r"keys: shape \[8, 4\], expected \[11, 4\]"):
        kernels.attend_batch(q, noise(8, 4), noise(0, 4), none, 0, 2 * lengths, starts + 3, noise(1), noise(8, 1, 4))
    with pytest.raises(ValueError, match="starts: -1; allowed are 0 or more"):
        kernels.compress_batch(128, x, x, lengths, starts - 1, torch.empty(0, 8))
