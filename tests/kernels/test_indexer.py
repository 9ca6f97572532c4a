"""The indexer's choice: every rung against float64; the native choice is exact despite instruction sets' filters."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention import EntryView, StoredRows, TileGroup, Tiles
from dsv4.kernels.indexer import reference, select_entries

from .tools import check_derivatives, noise

FILTERS = ("avx512_vnni", "avx512_bf16", "amx")
CASES = ["random", "equal", "near", "far", "negative", "infinite", "no number", "tiny"]
CASES += ["small", "smaller", "huge", "subnormal", "huge queries", "huge weights", "tiny weights"]


def inputs(case: str, tokens: int, heads: int, width: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * heads + width)
    q = torch.randn(tokens, heads, width, generator=generator)
    weights = torch.randn(tokens, heads, generator=generator)
    keys = torch.randn(entries, width, generator=generator)
    if case == "equal":
        keys[:] = keys[0]
    elif case == "near":  # closer than BF16 can distinguish
        keys = keys[:1] * (1 + 1e-5 * torch.randn(entries, 1, generator=generator))
    elif case == "far":
        keys *= torch.logspace(-12, 12, entries)[torch.randperm(entries, generator=generator), None]
    elif case == "negative":
        weights = -weights.abs()
    elif case == "infinite":
        keys[entries // 2, 0] = torch.inf
        q[0, 0, 0] = torch.inf
    elif case == "no number":
        keys[entries // 3] = torch.nan
    elif case == "small":  # squares of such numbers are zero in fp32
        keys *= 1e-24
    elif case == "smaller":
        keys *= 1e-22
        q *= 1e-20
    elif case == "huge":  # products overflow, in BF16 also some that do not in fp32
        keys *= 1e19
        q *= 1e18
    elif case == "subnormal":
        weights = torch.full_like(weights, 1e-45)
        keys *= 0.03
    elif case == "huge queries":  # rows' norms are near fp32's limit, scores are not
        q, keys, weights = q * 2.0**60, keys * 2.0**-20, weights.abs().clamp(max=1.9) * 2.0**29
    elif case == "huge weights":  # a weight times a query exceeds fp32's range, the score does not
        q, keys, weights = q * 2.0**60, keys * 2.0**-20, weights.abs() * 2.0**60
    elif case == "tiny weights":  # a weight times a query's last bit is subnormal
        q, keys, weights = q * 2.0**-38, keys * 2.0**27, weights * 2.0**-98
    elif case == "tiny":
        keys *= 1e-39
        q *= 1e-3
    return q, weights, keys


def choice(kernels: Any, q: Tensor, weights: Tensor, keys: Tensor, start: int, k: int) -> Tensor:
    index = torch.full((len(q), k), -7, dtype=torch.int64)
    kernels.index_top_k(q, weights, keys, start, k, index)
    return index


SHAPES = [(40, 8, 64, 1000, 16), (67, 3, 24, 259, 7), (9, 20, 128, 5000, 64), (3, 5, 40, 34001, 16)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("half", [0, 1])
def test_the_filter_changes_no_choice(kernels: Any, case: str, half: int) -> None:
    """Two of the four shapes per case: few tokens and many, few heads and more than fit a filter's tile."""
    tokens, heads, width, start, k = SHAPES[2 * half + CASES.index(case) % 2]
    q, weights, keys = inputs(case, tokens, heads, width, (start + tokens) // 4)
    together = choice(kernels, q, weights, keys, start, k)
    kernels.set_threads(2)
    assert torch.equal(choice(kernels, q, weights, keys, start, k), together)
    for token in range(tokens):
        alone = choice(kernels, q[token : token + 1], weights[token : token + 1], keys, start + token, k)
        assert torch.equal(alone[0], together[token]), token
    if kernels.selected() in FILTERS:
        kernels.select("avx512")  # every score is computed, with the same bits
    assert torch.equal(choice(kernels, q, weights, keys, start, k), together)


def test_overflow_in_tiles_but_not_in_chains(kernels: Any) -> None:
    q, weights, keys = torch.zeros(8, 1, 32), torch.ones(8, 1), torch.zeros(10, 32)
    q[:, 0, 0], keys[0, 0], keys[1, 0] = 1.843e19, 1.8415e19, 1.843e19
    assert (choice(kernels, q, weights, keys, 31, 1) == 1).all()
    # A head of weight zero may overflow too: infinity times zero is NaN.
    q, weights = torch.cat((q, torch.eye(32)[1].expand(8, 1, 32)), dim=1), torch.tensor([[0.0, 1.0]]).repeat(8, 1)
    keys[:, 1] = torch.tensor([1.0, 2.0]).repeat(5)
    assert (choice(kernels, q, weights, keys, 31, 1) == 1).all()


@pytest.mark.parametrize("numbers", ["whole", "bf16"])
def test_rounding_errors_that_add_up(kernels: Any, numbers: str) -> None:
    """The best keys are rounded down in all channels, the others up on average; then the same for the queries."""
    width, entries, k = 64, 300, 4
    # Equal maxima give a known step to rounding to whole numbers; from 1 to 2 BF16 has steps of 2^-7.
    low, step = (0.0, 1 / int((2**31 / width) ** 0.5)) if numbers == "whole" else (1.0, 2.0**-7)
    q, weights, keys = torch.ones(8, 1, width), torch.ones(8, 1), torch.zeros(entries, width)
    q[:, :, 0], keys[:, 0] = 0, 1
    keys[:, 1::2], keys[:, 2::2] = low + 0.52 * step, low + 0.40 * step
    keys[100:104, 1:] = low + 0.48 * step
    assert (choice(kernels, q, weights, keys, 4 * entries - 8, k) == torch.arange(100, 104)).all()
    q[:], keys[:] = 0, 0
    q[:, :, 0] = 1
    q[:, :, 1::2], q[:, :, 2::2] = low + 0.52 * step, low + 0.48 * step
    keys[:, 1::2], keys[100:104, 2::2] = 1, 1
    # Lower by just enough that the best lead by 31 hundredths of a step.
    keys[100:104, 1::2] = 1 - 31 * (low + 0.47 * step) / (32 * (low + 0.52 * step))
    assert (choice(kernels, q, weights, keys, 4 * entries - 8, k) == torch.arange(100, 104)).all()


class Batch:
    """Two sequences; the second one's row of the block table comes before the first one's."""

    lengths, starts, slots = np.array([21, 40]), np.array([1999, 3]), np.array([1, 0])


def test_output(rung: str) -> None:
    """Against float64, in a cache with pages in disorder; tokens that see k or fewer may choose nothing."""
    k, heads, width = 32, 4, 32
    table = torch.randperm(40, generator=torch.Generator().manual_seed(2)).view(2, 20).numpy()
    q, weights, keys = inputs("random", 61, heads, width, 40 * 32)
    pool = torch.cat((keys, torch.zeros(1, width)))
    view = EntryView(StoredRows(pool), 4, Batch(), table)
    position = torch.cat([torch.arange(s, s + n) for s, n in zip(Batch.starts, Batch.lengths, strict=True)])
    seen = (position + 1) // 4
    slot = torch.from_numpy(Batch.slots).repeat_interleave(torch.from_numpy(Batch.lengths))
    entry = torch.arange(512)
    rows = torch.from_numpy(table)[slot[:, None], entry // 32] * 32 + entry % 32
    rows = torch.where(entry < seen[:, None], rows, len(keys))
    tokens = torch.arange(61)
    group = TileGroup(0, 61, 0, 512, rows, seen[:, None], True)
    none = torch.zeros(61, 0, dtype=torch.int64)
    tiles = Tiles(tokens[:, None], tokens, True, none, none.bool()[:, None], [group])
    chosen, _ = select_entries(q, weights, view, tiles, k)
    assert chosen is not None and chosen.shape == (61, k)
    for t in range(61):
        scores = (weights[t].double()[:, None] * (q[t].double() @ pool[rows[t, : seen[t]]].double().t()).relu()).sum(0)
        want = scores.sort(descending=True, stable=True).indices[:k].sort().values
        got = chosen[t][chosen[t] >= 0]
        assert torch.equal(got, want) or (seen[t] <= k and not len(got)), t
        assert (chosen[t, len(got) :] == -1).all()


def test_no_choice_without_sparse_tiles_and_scores_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native_module", lambda: None)
    q, weights, keys = inputs("random", 2, 3, 8, 64)
    tokens, none = torch.arange(2), torch.zeros(2, 0, dtype=torch.int64)
    group = TileGroup(0, 2, 0, 64, slice(0, 64), torch.tensor([[3], [4]]), False)
    tiles = Tiles(tokens[:, None], tokens, True, none, none.bool()[:, None], [group])
    view = EntryView(StoredRows(keys), 4, Batch(), None)
    chosen, scores = select_entries(q, weights, view, tiles, 8, keep_scores=True)
    assert chosen is None and scores[0] is not None and scores[0].shape == (2, 1, 64)
    assert select_entries(q, weights, view, tiles, 8)[0] is None


@pytest.mark.parametrize("chunk", [3, 4096])
def test_gradients_of_the_scores(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORE_CHUNK", chunk)

    def formula(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
        k = k.expand(2, -1, -1)
        return torch.einsum("grh,grhn->grn", w, torch.einsum("grhd,gnd->grhn", q, k).clamp(min=0))

    q, weights = noise(2, 5, 3, 8), noise(2, 5, 3, seed=1)
    for keys in (noise(2, 7, 8, seed=2), noise(7, 8, seed=3)):
        check_derivatives(reference.index_scores, formula, (q, weights, keys))


def test_no_tokens(kernels: Any) -> None:
    q, weights, keys = inputs("random", 3, 2, 16, 50)
    assert choice(kernels, q[:0], weights[:0], keys, 190, 4).shape == (0, 4)


def test_few_entries_and_wrong_input(kernels: Any) -> None:
    q, weights, keys = inputs("random", 12, 2, 16, 5)
    assert (choice(kernels, q, weights, keys, 4, 3)[:11] == -1).all(), "tokens that see three entries read them all"
    chosen = choice(kernels, q, weights, keys, 4, 3)[11].tolist()
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(4))
    for start in (12, 2**63 - 1):
        with pytest.raises(ValueError, match="the keys end"):
            choice(kernels, q, weights, keys, start, 3)
    for shape in ((12, 0, 16), (12, 2, 0)):
        with pytest.raises(ValueError, match="allowed are 1 or more"):
            choice(kernels, torch.zeros(shape), torch.zeros(shape[:2]), torch.zeros(5, shape[2]), 4, 3)
