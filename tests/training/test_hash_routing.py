"""Tables of hash-routed layers."""

from __future__ import annotations

import pytest
import torch

from dsv4.training.hash_routing import balanced_table


def test_rows_are_distinct_and_load_is_even() -> None:
    counts = [1000.0 / (rank + 1) for rank in range(301)] + [0.0] * 50
    table = balanced_table(counts, experts=7, per_token=2, generator=torch.Generator().manual_seed(3))
    assert table.shape == (351, 2)
    assert bool((table[:, 0] < table[:, 1]).all())
    load = torch.zeros(7).index_add_(0, table.flatten(), torch.tensor(counts).repeat_interleave(2))
    # The most frequent id alone weighs 1000, half the mean load: dealing by load still evens it out.
    assert load.max() / load.mean() < 1.01
    assert table[301:].flatten().bincount(minlength=7).min() > 0


def test_layers_differ_but_a_seed_repeats() -> None:
    counts = [1.0] * 40
    tables = [balanced_table(counts, 5, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_too_many_experts_per_token_are_refused() -> None:
    with pytest.raises(ValueError, match="per_token is 6"):
        balanced_table([1.0], experts=5, per_token=6, generator=torch.Generator())
