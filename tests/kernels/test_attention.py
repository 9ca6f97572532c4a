"""Attention: every rung on cache views against one softmax in float64; the reference's sums over gathered keys."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.attention import ENTRY_CHUNK, EntryView, KeyView, StoredRows, TileGroup, Tiles, attend
from dsv4.kernels.attention.reference import attend_tiles

from .tools import near, noise, poisoned, set_threads

WINDOW, PAGE = 128, 128


@dataclass(frozen=True)
class Batch:
    lengths: np.ndarray
    starts: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True)
class Case:
    """Sequences with all their keys and entries at the end of the batch."""

    ratio: int
    batch: Batch
    keys: list[Tensor]  # of each sequence, [start + length, D]
    entries: list[Tensor]
    q: Tensor
    sink: Tensor
    k: int

    def visible(self, i: int) -> Tensor:
        """Entries that each new token of a sequence sees, int64 [length]."""
        position = torch.arange(self.batch.starts[i], len(self.keys[i]))
        return (position + 1) // self.ratio if self.ratio else position * 0

    def chosen(self) -> Tensor | None:
        if self.ratio != 4:
            return None
        chosen = torch.full((len(self.q), self.k), -1)
        for t, seen in enumerate(torch.cat([self.visible(i) for i in range(len(self.keys))]).tolist()):
            pick = torch.randperm(seen, generator=torch.Generator().manual_seed(t))[: self.k].sort().values
            chosen[t, : len(pick)] = pick
        return chosen

    def views(self, in_cache: bool, filler: float) -> tuple[KeyView, Tiles]:
        """Keys laid out as in a cache, pages in disorder, and one tile per token. filler: value of unused places."""
        D, N, per_page = self.q.shape[2], len(self.keys), PAGE // self.ratio if self.ratio else 1
        ring = torch.full((N + 2, WINDOW, D), filler) if in_cache else None
        counts = [len(e) for e in self.entries]
        pages = max(-(-c // per_page) for c in counts) + 1
        order = torch.randperm((N + 2) * pages, generator=torch.Generator().manual_seed(1)).numpy()
        table = order.reshape(N + 2, pages)
        pool = torch.full(((N + 2) * pages * per_page + 1, D), filler) if in_cache else torch.zeros(sum(counts) + 1, D)
        pool[-1] = 0
        rows, new = [], []
        for i, (slot, start) in enumerate(zip(self.batch.slots, self.batch.starts, strict=True)):
            e = np.arange(counts[i])
            place = table[slot, e // per_page] * per_page + e % per_page if in_cache else sum(counts[:i]) + e
            rows.append(torch.from_numpy(place))
            pool[rows[-1]] = self.entries[i]
            new.append(self.keys[i][start:])
            if ring is not None:
                old = torch.arange(max(0, start - WINDOW), start)
                ring[slot, old % WINDOW] = self.keys[i][old]
        stored = StoredRows(pool)
        entries = EntryView(stored, self.ratio, self.batch, table if in_cache else None) if self.ratio else None
        rings = StoredRows(ring) if ring is not None else None
        view = KeyView(torch.cat(new), self.batch, rings, torch.from_numpy(self.batch.slots), entries)
        return view, self._tiles(in_cache, rows, len(pool) - 1)

    def _tiles(self, in_cache: bool, rows: list[Tensor], blank: int) -> Tiles:
        T, ring_rows, first = len(self.q), WINDOW * len(self.keys) if in_cache else 0, 0
        seen = torch.cat([self.visible(i) for i in range(len(self.keys))])
        width = -(-int(seen.max()) // ENTRY_CHUNK) * ENTRY_CHUNK
        window, mask, index = [], [], []
        for i, start in enumerate(self.batch.starts.tolist()):
            position = torch.arange(start, len(self.keys[i]))[:, None]
            key = position - WINDOW + 1 + torch.arange(WINDOW)
            place = torch.where(key >= start, ring_rows + first + key - start, i * WINDOW + key % WINDOW)
            window.append(torch.where(key < 0, ring_rows + T, place))
            mask.append(key >= 0)
            row = torch.full((len(key), width), blank)
            row[:, : len(rows[i])] = rows[i]
            index.append(row)
            first += len(key)
        entries = torch.cat(index) if width else None
        group = TileGroup(0, T, 0, width, entries, seen[:, None], self.ratio == 4 and int(seen.max()) > self.k)
        tokens = torch.arange(T)
        return Tiles(tokens[:, None], tokens, True, torch.cat(window), torch.cat(mask)[:, None], [group])

    def exact(self) -> Tensor:
        """o [T, H, D] in float64, token by token."""
        chosen, out, t = self.chosen(), [], 0
        for i, start in enumerate(self.batch.starts.tolist()):
            for position, seen in zip(range(start, len(self.keys[i])), self.visible(i).tolist(), strict=True):
                read = torch.arange(seen)
                if chosen is not None and seen > self.k:
                    read = chosen[t]
                keys = self.keys[i][max(0, position - WINDOW + 1) : position + 1]
                keys = torch.cat((keys, self.entries[i][read])).double()
                scores = self.q[t].double() @ keys.mT / self.q.shape[2] ** 0.5
                p = torch.softmax(torch.cat((scores, self.sink.double()[:, None]), 1), 1)[:, :-1]
                out.append(p @ keys)
                t += 1
        return torch.stack(out)


def make_case(ratio: int, starts: list[int], lengths: list[int], heads: int, width: int) -> Case:
    ends = [s + n for s, n in zip(starts, lengths, strict=True)]
    slots = np.array([1 + i for i in range(len(starts))][::-1])
    return Case(
        ratio,
        Batch(np.array(lengths), np.array(starts), slots),
        [noise(end, width, seed=i) for i, end in enumerate(ends)],
        [noise(end // ratio if ratio else 0, width, seed=90 + i) for i, end in enumerate(ends)],
        noise(sum(lengths), heads, width, seed=50),
        noise(heads, seed=51),
        k=9,
    )


# Ratio, starts and lengths at the edges of windows, pages and entries, heads, width.
CASES = [
    (0, [0, 2], [1, 3], 1, 8),
    (4, [126, 0], [5, 33], 2, 33),
    (128, [300, 126], [1, 64], 8, 64),
    (0, [513, 300], [65, 1], 3, 130),
    (4, [513, 2, 300], [1, 40, 5], 64, 16),
    (128, [0, 513], [130, 2], 65, 40),
    (4, [0], [200], 2, 16),
    (128, [127, 2], [1, 1], 4, 20),
    (4, [1, 126, 35], [1, 1, 1], 1, 130),
]


@pytest.mark.parametrize(("ratio", "starts", "lengths", "heads", "width"), CASES, ids=str)
def test_cached_keys(rung: str, ratio: int, starts: list[int], lengths: list[int], heads: int, width: int) -> None:
    """A ragged batch that continues a cache. Unused places are finite for the reference, NaN for the kernels."""
    case = make_case(ratio, starts, lengths, heads, width)
    view, tiles = case.views(True, 7.0 if rung == "reference" else float("nan"))
    got, _ = attend(case.q, view, tiles, case.sink, case.chosen())
    assert near(got, case.exact().float(), 4e-6)
    for threads in (1, 2, 3):
        set_threads(rung, threads)
        assert torch.equal(attend(case.q, view, tiles, case.sink, case.chosen())[0], got)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_a_forward_without_a_cache(rung: str, ratio: int) -> None:
    case = make_case(ratio, [0, 0, 0], [1, 150, 33], 3, 24)
    view, tiles = case.views(False, float("nan"))
    got, _ = attend(case.q, view, tiles, case.sink, case.chosen())
    assert near(got, case.exact().float(), 4e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_a_strided_sink(rung: str, cached: bool) -> None:
    case = make_case(4, [0], [40], 3, 24)
    view, tiles = case.views(cached, 7.0)
    strided = torch.stack((case.sink, case.sink), 1)[:, 0]
    got, want = (attend(case.q, view, tiles, sink, case.chosen())[0] for sink in (strided, case.sink))
    assert torch.equal(got, want)


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_token_by_token_has_the_bits_of_one_call(kernels: Any, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's key is written to the ring after it. (The reference's model: tests/model/test_chunking.py.)"""
    start, tokens, heads, width = 120, 40, 3, 33
    case = make_case(ratio, [start], [tokens], heads, width)
    chosen = case.chosen() if ratio == 4 else torch.full((tokens, 1), -1)
    assert chosen is not None
    entries = torch.cat((case.entries[0], poisoned(3, width)))
    window, old = poisoned(WINDOW, width), torch.arange(max(0, start - WINDOW), start)
    window[old % WINDOW] = case.keys[0][old]

    def run(first: int, last: int) -> Tensor:
        o = poisoned(last - first, heads, width)
        new = case.keys[0][start + first : start + last]
        rows = case.q[first:last] * width**-0.5, new, window, entries, chosen[first:last]
        kernels.attend(*rows, ratio, start + first, case.sink, o)
        return o

    whole = run(0, tokens)
    for t in range(tokens):
        assert torch.equal(run(t, t + 1)[0], whole[t])
        window[(start + t) % WINDOW] = case.keys[0][start + t]


def test_wrong_shapes_are_refused(kernels: Any) -> None:
    many = (noise(1, 1, 4), noise(1, 4), noise(128, 4), noise(2, 4), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="chosen entry 2: allowed are 0 to 1"):
        kernels.attend(*many, 4, 7, noise(1), noise(1, 1, 4))
    with pytest.raises(ValueError, match=r"entries: shape \[1, 4\], expected \[2, 4\]"):
        kernels.attend(*many[:3], noise(1, 4), many[4], 4, 7, noise(1), noise(1, 1, 4))
    with pytest.raises(ValueError, match="tokens, heads, channels or k 0: allowed are 1 to"):
        none = (noise(0, 2, 8), noise(0, 8), noise(128, 8), noise(0, 8), torch.zeros(0, 1).long())
        kernels.attend(*none, 0, 5, noise(2), noise(0, 2, 8))


class Watched:
    """The kernels; notes how many numbers each choice has that they are given."""

    def __init__(self, kernels: Any, argument: int) -> None:
        self.kernels, self.argument, self.sizes = kernels, argument, []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.sizes.append(arguments[self.argument].numel())
            return getattr(self.kernels, name)(*arguments)

        return call


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_without_a_choice_gets_none_made(kernels: Any, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of -1 throughout would be a number for each token and entry."""
    case = make_case(4, [0, 0], [33, 150], 3, 24)
    case = replace(case, k=37)
    view, tiles = case.views(cached, 7.0)
    want = attend(case.q, view, tiles, case.sink, torch.full((183, 37), -1))[0]
    watched = Watched(kernels, 4 if cached else 3)
    monkeypatch.setattr(cpu, "kernels", lambda: watched)
    q = case.q.clone().requires_grad_(not cached)
    got, probs = attend(q, view, tiles, case.sink, keep_probs=not cached)
    assert torch.equal(got.detach(), want) and (cached or (probs is not None and probs.shape == (183, 37)))
    if not cached:
        got.sum().backward()
    assert watched.sizes == [0, 0]


def test_a_missing_choice_is_an_error(kernels: Any) -> None:
    none, one = torch.empty(0, 1, dtype=torch.int64), (noise(8, 1, 4), noise(8, 4))
    with pytest.raises(ValueError, match="chosen: none, but a token sees 2 entries"):
        lengths, starts = np.array([8]), np.array([0])
        kernels.attend_batch(*one, noise(2, 4), none, 4, lengths, starts, noise(1), noise(8, 1, 4))
    with pytest.raises(ValueError, match="entries that a token sees without a choice 2: allowed are 0 to 1"):
        kernels.attend(*one, noise(128, 4), noise(2, 4), none, 4, 0, noise(1), noise(8, 1, 4))


# The reference's sums over gathered keys


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
    """(output [G, R, H, D], probabilities of window, entries and sink in turn, summed over heads [G, R, W + E + 1])."""
    G, R, H, D = q.shape
    keys, mask = window[:, None].expand(-1, R, -1, -1), window_mask
    if entries is not None and entry_mask is not None:
        missing = (None,) * (4 - entries.dim())
        own = entries[missing] if entries.dim() == 2 else entries[:, None] if entries.dim() == 3 else entries
        keys, mask = torch.cat((keys, own.expand(G, R, -1, -1)), 2), torch.cat((window_mask, entry_mask), -1)
    scores = torch.einsum("grhd,grkd->grhk", q, keys) / D**0.5
    scores = torch.where(mask[:, :, None], scores, torch.full_like(scores, float("-inf")))
    scores = torch.cat((scores, sink[:, None].expand(G, R, H, 1)), -1)
    p = torch.softmax(scores, -1)
    return torch.einsum("grhk,grkd->grhd", p[..., :-1], keys), p.sum(2)


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("G", "R", "H", "D"), [(1, 1, 1, 8), (3, 5, 2, 24), (2, 64, 3, 10)])
def test_output_and_probabilities(form: str, G: int, R: int, H: int, D: int) -> None:
    inputs = case(form, G, R, H, D, E=13 if form == "a row's own" else 128)
    out, probs = attend_tiles(**inputs, keep_probs=True)
    want, want_probs = dense(**doubled(inputs))
    assert (out - want).abs().max() < 2e-6
    assert probs is not None and attend_tiles(**inputs)[1] is None
    of_entries = probs.entries()
    assert (of_entries is None) == (form == "none")
    parts = [probs.window(), *([] if of_entries is None else [of_entries]), probs.sink().unsqueeze(-1)]
    assert (torch.cat(parts, -1) - want_probs).abs().max() < 2e-6


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
    out, probs = attend_tiles(**inputs, keep_probs=True)
    assert torch.equal(out[1, 2], torch.zeros(3, 16))
    assert probs is not None and torch.equal(probs.sink()[1, 2], torch.tensor(3.0))
    of_entries = probs.entries()
    assert of_entries is None or torch.equal(of_entries[1, 2], torch.zeros(64))
    assert out.isfinite().all() and (out[0] != 0).all()


def test_entries_without_window_keys() -> None:
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
def test_masked_entries_at_the_end_change_no_bit(form: str) -> None:
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
