"""Owners of dense matrices: even loads, and parts that come back as they went (the exchange itself: test_ranks.py)."""

from __future__ import annotations

from dsv4.parallel.zero import Matrix, assign_owners, newton_schulz_cost


def test_costly_matrices_are_spread_over_the_ranks() -> None:
    costs = {"a": 9, "b": 8, "c": 5, "d": 4, "e": 3, "f": 1}
    owners = assign_owners(costs, 3)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(3)]
    assert loads == [10, 11, 9] and list(owners) == list(costs)


def test_ranks_beyond_the_matrices_own_none() -> None:
    assert assign_owners({"a": 1, "b": 1}, 4) == {"a": 0, "b": 1}


def test_cost_is_that_of_the_short_side() -> None:
    assert newton_schulz_cost([4], 16) == newton_schulz_cost([16], 4) == 2 * 4 * 4 * 16 + 4**3
    assert newton_schulz_cost([4, 4], 16) == 2 * newton_schulz_cost([4], 16)


def test_parts_are_the_chunks_that_fsdp_makes() -> None:
    assert [Matrix("a", 10, 3, 0).part(rank, 4) for rank in range(4)] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert [Matrix("a", 2, 3, 0).part(rank, 4) for rank in range(4)] == [(0, 1), (1, 1), (2, 0), (2, 0)]
