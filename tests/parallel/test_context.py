"""A batch cut over ranks has the loss and gradients of one process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from dsv4.parallel.context import DocumentCut, even_cut

from .ranks import run_ranks

LENGTHS = (1, 3, 4, 5, 127, 128, 129, 300)
Case = tuple[list[int], list[int] | None, str]


def check(ranks: int, cases: list[Case], kernels: str, *arguments: Any) -> None:
    for found in run_ranks("context_ranks", "compare", ranks, cases, *arguments, DSV4_KERNELS=kernels):
        for case, (losses, together, worst) in zip(cases, found, strict=True):
            assert losses < 1e-6, (case, losses)
            assert together < 1e-6, (case, together)
            assert worst[0] < 1e-4, (case, worst)  # of a few numbers that are small sums of large terms


def random_cases(seed: int, ranks: int) -> list[Case]:
    draw = random.Random(seed)
    cases: list[Case] = []
    for phase in ("dense", "warmup", "sparse", "sparse"):
        lengths = draw.choices(LENGTHS, k=draw.randint(1, 6))
        lengths += [5] if sum(lengths) < 2 * ranks else []
        inner = sorted(draw.sample(range(1, sum(lengths)), ranks - 1))
        cases.append((lengths, draw.choice([None, [0, *inner, sum(lengths)]]), phase))
    return cases


def test_two_ranks_have_the_gradients_of_one_process() -> None:
    cases: list[Case] = [
        ([1, 129, 5, 130], [0, 132, 265], "sparse"),
        ([3, 150], [0, 5, 153], "warmup"),
        ([140, 4, 2], None, "dense"),
    ]
    check(2, cases, "native")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_batches(ranks: int, kernels: str) -> None:
    seed = ranks + len(kernels)
    check(ranks, random_cases(seed, ranks) + random_cases(seed + 100, ranks), kernels, "float", seed)


@pytest.mark.slow
def test_documents_over_more_than_two_ranks_and_one_token_per_rank() -> None:
    cases: list[Case] = [
        ([300], [0, 1, 130, 131, 300], "sparse"),
        ([5, 300], [0, 5, 6, 9, 305], "sparse"),
        ([3, 3, 3], [0, 1, 2, 3, 9], "sparse"),
        ([4, 129, 1, 1], None, "warmup"),
        (list(LENGTHS), None, "sparse"),
    ]
    check(4, cases, "native")


@pytest.mark.slow
def test_shipped_numerics() -> None:
    check(2, [([300, 5], [0, 130, 305], "sparse")], "reference", "shipped")


def test_tables_name_each_row_that_a_rank_reads_once() -> None:
    draw = random.Random(3)
    for _ in range(50):
        lengths = np.array(draw.choices(LENGTHS, k=5))
        inner = sorted(draw.sample(range(1, int(lengths.sum())), 3))
        cut = DocumentCut(lengths, np.array([0, *inner, lengths.sum()]))
        for bounds, needed in ((cut.bounds, np.minimum(cut.before(), 7)), (cut.first_entries(4), cut.before() // 4)):
            tables = [cut.table(bounds, needed, rank) for rank in range(4)]
            for reader, table in enumerate(tables):
                assert table.received == [other.sent[reader] for other in tables]
                rows = [
                    other.rows.split(other.sent)[reader].numpy() + bounds[owner] for owner, other in enumerate(tables)
                ]
                want = np.arange(bounds[reader] - needed[reader], bounds[reader])
                assert (np.concatenate(rows) == want).all()


def test_a_cut_without_a_token_for_each_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="one token per rank at least"):
        DocumentCut(np.array([3]), even_cut(3, 4))
