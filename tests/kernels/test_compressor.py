"""Compressor: every rung, in chunks and in ragged batches, against a sum over each window in float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.kernels.compressor import Windows, compress
from dsv4.kernels.compressor.reference import pool

from .tools import check_derivatives, near, noise, poisoned, set_threads


@dataclass(frozen=True)
class Batch:
    lengths: np.ndarray
    starts: np.ndarray
    slots: np.ndarray


def windows(ratio: int, parts: list[tuple[int, int, int]], state: tuple[Tensor, Tensor] | None) -> Windows:
    """View of sequences (slot, start, length), from the definition of the indices."""
    slots, T = 2 * ratio if ratio == 4 else ratio, sum(n for _, _, n in parts)
    state_rows, first = slots * len(parts) if state is not None else 0, 0
    source, rows, tokens, positions = [], [], [], []
    for i, (slot, start, n) in enumerate(parts):
        end = start + n
        for window in range(start // ratio, end // ratio):
            key = torch.arange((window + 1) * ratio - slots, (window + 1) * ratio)
            place = torch.where(key >= start, state_rows + first + key - start, i * slots + key % slots)
            source.append(torch.where(key < 0, state_rows + T, place))
        kept = torch.arange(max(start, end - slots), end)
        rows.append(slot * slots + kept % slots)
        tokens.append(first + kept - start)
        positions.append(torch.arange(start, end))
        first += n
    slot, start, length = (np.array(column) for column in zip(*parts, strict=True))
    return Windows(
        ratio=ratio,
        batch=Batch(length, start, slot),
        positions=torch.cat(positions),
        source=torch.stack(source) if source else torch.zeros(0, slots, dtype=torch.int64),
        state_kv=state[0] if state is not None else None,
        state_score=state[1] if state is not None else None,
        state_slots=torch.from_numpy(slot),
        state_row=torch.cat(rows),
        state_token=torch.cat(tokens),
    )


def exact(ratio: int, kv: Tensor, score: Tensor, ape: Tensor) -> Tensor:
    """Entries of all closed windows of one sequence, float64."""
    kv, score = kv.double(), score.double() + ape.double()[torch.arange(len(kv)) % ratio]
    half, entries = kv.shape[1] // 2, []
    for end in range(ratio, len(kv) + 1, ratio):
        own = slice(end - ratio, end)
        values, weights = kv[own], score[own]
        if ratio == 4:
            before = slice(max(0, end - 2 * ratio), end - ratio)
            values = torch.cat((kv[before, :half], kv[own, half:]))
            weights = torch.cat((score[before, :half], score[own, half:]))
        entries.append((weights.softmax(0) * values).sum(0))
    return torch.stack(entries)


def shapes(ratio: int, total: int) -> tuple[int, int]:
    """(state rows, width of an entry)."""
    return (8, total // 2) if ratio == 4 else (ratio, total)


@pytest.mark.parametrize(
    ("ratio", "total", "chunk"),
    [
        *((4, 2, 1), (4, 66, 3), (4, 128, 4), (4, 66, 5), (4, 2, 127), (4, 66, 129), (4, 128, 326)),
        *((128, 50, 1), (128, 1, 127), (128, 50, 128), (128, 50, 129), (128, 50, 326)),
    ],
)
def test_chunks_give_the_entries_and_the_state(rung: str, ratio: int, total: int, chunk: int) -> None:
    tokens, (rows, width) = 2 * 128 + 70, shapes(ratio, total)
    kv, score, ape = noise(tokens, total), noise(tokens, total, seed=1, scale=3), noise(ratio, total, seed=2)
    filler = float("nan") if rung != "reference" else 5.0
    state = torch.full((3, rows, total), filler), torch.full((3, rows, total), filler)
    entries: list[Tensor] = []
    for threads, start in enumerate(range(0, tokens, chunk)):
        set_threads(rung, 1 + threads % 3)
        part = slice(start, min(tokens, start + chunk))
        view = windows(ratio, [(1, start, part.stop - start)], state)
        made = compress(kv[part], score[part], ape, view)
        assert (made is None) == (len(view.source) == 0)
        entries += [made] if made is not None else []
    got = torch.cat(entries)
    assert got.shape == (tokens // ratio, width) and near(got, exact(ratio, kv, score, ape).float())
    whole = compress(kv, score, ape, windows(ratio, [(0, 0, tokens)], None))
    assert whole is not None and (torch.equal(whole, got) if rung != "reference" else near(whole, got))
    held = torch.arange(tokens - rows, tokens)
    assert torch.equal(state[0][1, held % rows], kv[held])
    assert torch.equal(state[1][1, held % rows], (score + ape[torch.arange(tokens) % ratio])[held])
    untouched = torch.cat((state[0][0], state[1][2]))
    assert torch.equal(untouched.nan_to_num(5.0), torch.full_like(untouched, 5.0))


@pytest.mark.parametrize("ratio", [4, 128])
def test_sequences_of_a_batch_do_not_see_each_other(rung: str, ratio: int) -> None:
    total, (rows, _) = 12, shapes(ratio, 12)
    ape, lengths = noise(ratio, total, seed=2), (300, 5, 131)
    data = [(noise(n, total, seed=n), noise(n, total, seed=n + 1)) for n in lengths]
    state = torch.zeros(3, rows, total), torch.zeros(3, rows, total)
    got: list[list[Tensor]] = [[], [], []]
    at = [0, 0, 0]
    for step in ((5, 3, 0), (200, 0, 127), (95, 1, 1), (0, 1, 3)):
        parts = [(i, at[i], n) for i, n in reversed(list(enumerate(step))) if n]
        kv, score = (torch.cat([data[i][which][a : a + n] for i, a, n in parts]) for which in (0, 1))
        made = compress(kv, score, ape, windows(ratio, parts, state))
        counts = [(a + n) // ratio - a // ratio for _, a, n in parts]
        assert (made is None) == (sum(counts) == 0)
        for (i, _, _), entries in zip(parts, made.split(counts) if made is not None else [], strict=False):
            got[i].append(entries)
        for i, _, n in parts:
            at[i] += n
    for i, (kv, score) in enumerate(data):
        if lengths[i] >= ratio:
            assert near(torch.cat(got[i]), exact(ratio, kv, score, ape).float())


@pytest.mark.parametrize(("ratio", "total"), [(4, 10), (128, 3)])
def test_gradients(ratio: int, total: int) -> None:
    tokens = 2 * ratio + 3
    view = windows(ratio, [(0, 0, tokens)], None)

    def kernel(kv: Tensor, score: Tensor, ape: Tensor) -> Tensor:
        entries = compress(kv, score, ape, view)
        assert entries is not None
        return entries

    inputs = noise(tokens, total), noise(tokens, total, seed=1), noise(ratio, total, seed=2)
    check_derivatives(kernel, lambda kv, score, ape: exact(ratio, kv, score, ape), inputs)


def test_a_slot_with_score_minus_infinity_has_no_weight() -> None:
    kv, score = noise(3, 5, 4), noise(3, 5, 4, seed=1)
    score[:, 0] = float("-inf")
    assert near(pool(kv, score), pool(kv[:, 1:], score[:, 1:]))


def test_wrong_shapes_are_refused(kernels: Any) -> None:
    with pytest.raises(ValueError, match="ratio 8; allowed are 4 and 128"):
        kernels.compress(8, noise(2, 4), noise(2, 4), noise(8, 4), 0, poisoned(8, 4), poisoned(8, 4), poisoned(1, 4))
