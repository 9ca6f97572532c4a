"""Owners of dense matrices: even loads, and parts that come back as they went (the exchange itself: test_ranks.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4.analysis.degrees import Degrees
from dsv4.analysis.hardware import cpu
from dsv4.analysis.training_memory import Setting, StageShape, rank_memory
from dsv4.parallel.zero import Matrix, assign_owners, newton_schulz_cost

from ..training.tiny_training import CONFIG
from .ranks import run_ranks


def test_costly_matrices_are_spread_over_the_ranks() -> None:
    costs = {"a": 9, "b": 8, "c": 5, "d": 4, "e": 3, "f": 1}
    owners = assign_owners(costs, 3)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(3)]
    assert loads == [10, 11, 9] and list(owners) == list(costs)


def test_ranks_beyond_the_matrices_own_none() -> None:
    assert assign_owners({"a": 1, "b": 1}, 4) == {"a": 0, "b": 1}


def test_cost_is_that_of_the_short_side() -> None:
    assert newton_schulz_cost([(4, 16)]) == newton_schulz_cost([(16, 4)]) == 2 * 4 * 4 * 16 + 4**3
    assert newton_schulz_cost([(4, 16)] * 2) == 2 * newton_schulz_cost([(4, 16)])


def test_parts_are_the_chunks_that_fsdp_makes() -> None:
    assert [Matrix("a", 10, 3, 0).part(rank, 4) for rank in range(4)] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert [Matrix("a", 2, 3, 0).part(rank, 4) for rank in range(4)] == [(0, 1), (1, 1), (2, 0), (2, 0)]


@pytest.mark.parametrize("degrees", [{"data": 2}, pytest.param({"expert": 2}, marks=pytest.mark.slow)])
def test_rows_and_whole_matrices_take_the_bytes_that_are_predicted(degrees: dict[str, int], tmp_path: Path) -> None:
    found = run_ranks("zero_ranks", "step_bytes", 2, tmp_path, degrees)
    setting = Setting(CONFIG, cpu(1e9, 1e9), 2, "fp32", quantized=False, mtp=True, efficiency=1.0)
    memory = rank_memory(setting, StageShape("one", "sparse", 64, 64, 128, 1, 128), Degrees(**degrees), "none", 0, 1)
    for kind in ("masters", "gradients", "momenta"):
        assert sum(rank[kind] for rank in found) == pytest.approx(2 * getattr(memory, kind), rel=0.03), kind
