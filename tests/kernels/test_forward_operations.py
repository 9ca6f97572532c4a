"""The operations of a native forward, one by one, against the reference: odd sizes, on every instruction set of the
machine, outputs and what may not be read poisoned with NaN; a token's bits whatever is beside it and the threads."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.kernels.attention.reference import ENTRY_CHUNK, attend_tiles
from dsv4.kernels.compressor.reference import fold_overlap, pool
from dsv4.kernels.mhc.reference import collect, distribute, hc_weights, mixes
from dsv4.kernels.rope.reference import rotate, rotation
from dsv4.kernels.router.reference import affinity
from dsv4.kernels.swiglu.reference import clamped_swiglu
from dsv4.kernels.topk import top_k_lowest_index

WINDOW = 128
NAN = float("nan")
NANO = ModelConfig.preset("nano")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, NAN)


def near(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> bool:
    """Equal to rounding, measured against the largest number of the result."""
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


@pytest.mark.parametrize(
    ("tokens", "streams", "hidden"), [(1, 4, 64), (2, 4, 129), (3, 1, 7), (9, 2, 33), (70, 3, 40), (5, 16, 20)]
)
def test_hyper_connections(kernels: Any, tokens: int, streams: int, hidden: int) -> None:
    config = replace(NANO, hc_mult=streams, hidden_size=hidden)
    count = streams * (2 + streams)
    x, fn, norm = random(tokens, streams, hidden), random(count, streams * hidden, seed=1), 1 + random(hidden, seed=2)
    scale, base = random(3, seed=3), random(count, seed=4)
    pre, post, comb = hc_weights(mixes(x, fn, config.rms_norm_eps), scale, base, config)
    want = torch.rms_norm(collect(pre, x), (hidden,), norm, config.rms_norm_eps)

    def read(part: Tensor) -> tuple[Tensor, Tensor]:
        weights, out = poisoned(len(part), count), poisoned(len(part), hidden)
        sizes = (config.hc_sinkhorn_iters, config.rms_norm_eps, config.hc_eps)
        kernels.hc_pre(part, fn, scale, base, norm, *sizes, weights, out)
        return weights, out

    weights, out = read(x)
    assert near(weights, torch.cat((pre, post, comb.flatten(1)), dim=1), 2e-5) and near(out, want, 2e-5)
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for part in (slice(0, 1), slice(tokens // 2, tokens), slice(0, tokens)):
            assert all(torch.equal(a, b[part]) for a, b in zip(read(x[part]), (weights, out), strict=True))

    y, written = random(tokens, hidden, seed=5), x.clone()
    kernels.hc_post(y, weights, written)
    pre, post, comb = weights.split((streams, streams, streams * streams), dim=1)
    assert near(written, distribute(y, x, post, comb.reshape(-1, streams, streams)))
    last = x[-1:].clone()
    kernels.hc_post(y[-1:], weights[-1:], last)
    assert torch.equal(last, written[-1:])


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (3, 6, 2), (40, 17, 5), (9, 256, 6), (2, 384, 8)])
def test_router(kernels: Any, tokens: int, experts: int, k: int) -> None:
    logits, bias = 4 * random(tokens, experts), random(experts, seed=1)
    logits[0, :] = logits[0, 0]  # equal scores: the lower number, where the bias is equal too
    bias[: experts // 2] = 0.5
    logits[-1, 0], logits[-1, -1] = 200.0, -200.0
    ids, table = torch.arange(tokens) % 5, torch.stack([torch.randperm(experts)[:k] for _ in range(5)])
    scores = affinity(logits)
    for choice, chosen in ((bias, top_k_lowest_index(scores + bias, k)), (table, table[ids])):
        index, weights = torch.full((tokens, k), -7), poisoned(tokens, k)
        kernels.route(logits, choice, ids, 2.5, index, weights)
        assert torch.equal(index, chosen)
        picked = scores.gather(1, chosen)
        assert near(weights, picked / (picked.sum(-1, keepdim=True) + 1e-20) * 2.5)
        alone, alone_weights = torch.full((1, k), -7), poisoned(1, k)
        kernels.route(logits[-1:], choice, ids[-1:], 2.5, alone, alone_weights)
        assert torch.equal(alone[0], index[-1]) and torch.equal(alone_weights[0], weights[-1])


def compressed(ratio: int, kv: Tensor, score: Tensor) -> Tensor:
    """Entries of all closed windows, by the reference's pooling, window after window."""
    before = ratio if ratio == 4 else 0
    pad_kv, pad_score = torch.zeros(before, kv.shape[1]), torch.full((before, kv.shape[1]), float("-inf"))
    kv, score = torch.cat((pad_kv, kv)), torch.cat((pad_score, score))
    slots = [slice(w * ratio, w * ratio + before + ratio) for w in range((len(kv) - before) // ratio)]
    kv_rows, score_rows = torch.stack([kv[s] for s in slots]), torch.stack([score[s] for s in slots])
    if before:
        kv_rows, score_rows = fold_overlap(kv_rows, ratio), fold_overlap(score_rows, ratio)
    return pool(kv_rows, score_rows)


@pytest.mark.parametrize(("ratio", "total"), [(4, 2), (4, 66), (4, 128), (128, 1), (128, 50)])
def test_compressor(kernels: Any, ratio: int, total: int) -> None:
    tokens, rows = 2 * WINDOW + 70, 2 * ratio if ratio == 4 else ratio
    kv, score, ape = random(tokens, total), 3 * random(tokens, total, seed=1), random(ratio, total, seed=2)
    want = compressed(ratio, kv, score + ape.repeat(tokens // ratio + 1, 1)[:tokens])
    bits: Tensor | None = None
    for chunk in (tokens, 1, 3, 4, 5, 127, 128, 129):
        entries = poisoned(tokens // ratio + 2, total // 2 if ratio == 4 else total)
        state_kv, state_score = poisoned(rows, total), poisoned(rows, total)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            kernels.compress(ratio, kv[part], score[part].clone(), ape, start, state_kv, state_score, entries)
        assert entries[tokens // ratio :].isnan().all(), "nor what lies behind the last entry"
        entries = entries[: tokens // ratio]
        assert near(entries, want) and (bits is None or torch.equal(entries, bits))
        bits = entries
        held = torch.arange(tokens - rows, tokens)
        assert torch.equal(state_kv[held % rows], kv[held])


ATTENTION = [(1, 1, 8), (2, 3, 33), (8, 8, 64), (3, 5, 130), (64, 2, 16), (65, 1, 40)]  # heads, tokens, width


@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("start", [0, 2, 126, 300, 513])
@pytest.mark.parametrize(("heads", "tokens", "width"), ATTENTION)
def test_attention(kernels: Any, ratio: int, start: int, heads: int, tokens: int, width: int) -> None:
    k, end = 9, start + tokens
    q, keys, sink = random(tokens, heads, width), random(end, width, seed=1), random(heads, seed=2)
    seen = (torch.arange(start, end) + 1) // ratio if ratio else torch.zeros(tokens, dtype=torch.int64)
    count = int(seen.max())
    entries = torch.cat((random(count, width, seed=3), poisoned(3, width)))  # and nobody reads what nobody sees
    chosen = torch.full((tokens, k), -1)
    for t, visible in enumerate(seen.tolist()):
        if ratio == 4 and visible > k:
            chosen[t] = torch.randperm(visible, generator=torch.Generator().manual_seed(t))[:k].sort().values
    ring, old = poisoned(WINDOW, width), torch.arange(max(0, start - WINDOW), start)
    ring[old % WINDOW] = keys[old]

    positions = torch.arange(start, end)
    back = positions[:, None] - torch.arange(end)
    visible = torch.arange(-(-max(count, 1) // ENTRY_CHUNK) * ENTRY_CHUNK) < seen[:, None]
    for t in range(tokens):
        if chosen[t, 0] >= 0:
            visible[t] = False
            visible[t, chosen[t]] = True
    padded = torch.zeros(visible.shape[1], width)
    padded[:count] = entries[:count]
    want, _ = attend_tiles(
        q.double()[None],
        keys.double()[None],
        ((back >= 0) & (back < WINDOW))[None],
        sink,
        padded.double(),
        visible[None],
    )

    def run(part: slice, window: Tensor) -> Tensor:
        o = poisoned(part.stop - part.start, heads, width)
        rows = (q[part] * width**-0.5, keys[start + part.start : start + part.stop], window, entries, chosen[part])
        kernels.attend(*rows, ratio, start + part.start, sink, o)
        return o

    whole = run(slice(0, tokens), ring)
    assert near(whole, want[0].float(), 4e-6)
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        assert torch.equal(run(slice(0, tokens), ring), whole)
    window = ring.clone()
    for t in range(tokens):  # token by token, each into the ring behind it
        assert torch.equal(run(slice(t, t + 1), window)[0], whole[t])
        window[(start + t) % WINDOW] = keys[start + t]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (2, 16), (5, 33), (70, 100)])
def test_swiglu(kernels: Any, rows: int, width: int) -> None:
    gate, up, weight = 5 * random(rows, width), 5 * random(rows, width, seed=1), random(rows, seed=2)
    gate[0, -1], up[-1, 0] = 100.0, -100.0
    for limit in (7.0, 0.5):
        want, got = clamped_swiglu(gate, up, limit, weight[:, None]), gate.clone()
        kernels.swiglu(got, up, limit, weight)
        assert near(got, want)
        alone = gate[-1:].clone()
        kernels.swiglu(alone, up[-1:], limit, weight[-1:])
        assert torch.equal(alone[0], got[-1])
    broken = gate.clone()
    broken[0, 0] = NAN
    kernels.swiglu(broken, up, 7.0, weight)
    assert broken[0, 0].isnan() and broken.isnan().sum() == 1


@pytest.mark.parametrize(("rows", "width", "pairs"), [(1, 2, 1), (3, 9, 4), (5, 64, 32), (70, 130, 17), (2, 5, 0)])
def test_rotation(kernels: Any, rows: int, width: int, pairs: int) -> None:
    x, speeds = random(rows, width), 10.0 ** -torch.arange(pairs).float().div(4)
    for start in (0, 5, 1_000_000):
        cos, sin = rotation(speeds, torch.arange(start, start + rows))
        got = x.clone()
        factors = poisoned(rows, pairs), poisoned(rows, pairs)
        kernels.rotation(speeds.tolist(), torch.arange(start, start + rows), *factors)
        kernels.rotate(got, *factors)
        assert near(got, rotate(x, cos, sin), 1e-6)
        kernels.rotate(got, factors[0], -factors[1])
        assert near(got, x, 1e-6)


def test_wrong_shapes_are_refused(kernels: Any) -> None:
    x = random(2, 4, 8)
    with pytest.raises(ValueError, match=r"fn: shape \[24, 31\], expected \[24, 32\]"):
        kernels.hc_pre(x, random(24, 31), random(3), random(24), random(8), 2, 1e-6, 1e-6, random(2, 24), random(2, 8))
    with pytest.raises(ValueError, match="expert of tid2eid 6: allowed are 0 to 5"):
        kernels.route(
            random(1, 6), torch.tensor([[0, 6]]), torch.tensor([0]), 1.0, torch.zeros(1, 2).long(), random(1, 2)
        )
    with pytest.raises(ValueError, match="ratio 8; allowed are 4 and 128"):
        kernels.compress(8, random(2, 4), random(2, 4), random(8, 4), 0, random(8, 4), random(8, 4), random(1, 4))
    with pytest.raises(ValueError, match="chosen entry 2: allowed are 0 to 1"):
        many = (random(1, 1, 4), random(1, 4), random(128, 4), random(2, 4), torch.tensor([[2]]))
        kernels.attend(*many, 4, 7, random(1), random(1, 1, 4))
    with pytest.raises(ValueError, match=r"entries: shape \[1, 4\], expected \[2, 4\]"):
        kernels.attend(*many[:3], random(1, 4), many[4], 4, 7, random(1), random(1, 1, 4))
    with pytest.raises(ValueError, match="tokens, heads, channels or k 0: allowed are 1 to"):
        none = (random(0, 2, 8), random(0, 8), random(128, 8), random(0, 8), torch.zeros(0, 1).long())
        kernels.attend(*none, 0, 5, random(2), random(0, 2, 8))
    with pytest.raises(ValueError, match="choice: allowed are a float32 bias and a contiguous int64 table"):
        kernels.route(
            random(1, 6), torch.zeros(6).int(), torch.tensor([0]), 1.0, torch.zeros(1, 2).long(), random(1, 2)
        )
