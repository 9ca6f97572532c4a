"""Ranks leave alone what no gradient reaches, as one process does, though each sees its part of the gradients only."""

from __future__ import annotations

from pathlib import Path

import pytest

from .optim_ranks import WITHOUT
from .ranks import run_ranks


@pytest.mark.parametrize(
    ("degrees", "lora"),
    [
        ({"data": 2}, None),
        ({"expert": 2}, "adamw_no_decay"),
        pytest.param({"expert": 2}, None, marks=pytest.mark.slow),
    ],
)
def test_ranks_step_to_the_bits_of_one_process(degrees: dict[str, int], lora: str | None, tmp_path: Path) -> None:
    ranks = run_ranks("optim_ranks", "compare", 2, tmp_path, degrees, lora)
    for found in ranks:
        assert len(found) > 10
        for name, (same, same_moments, moved) in found.items():
            assert same and same_moments, name
            if name.startswith(WITHOUT):
                assert not moved, name
            elif ".experts." not in name and name != "embed.weight":
                assert moved, name
    if lora is None:
        assert all(found["embed.weight"][2] for found in ranks), "rows of zeros decay with the rest of the embedding"
    else:  # the first rank's experts have gradients of zero, and moments that move them with the whole stack
        assert all(found[name][2] for found in ranks for name in found if ".experts." in name)
