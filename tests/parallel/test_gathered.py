"""Steps on stored values, which cross the ranks' parts of a matrix, gather a block at a time as all others do."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4.analysis.activations import Recompute

from .ranks import run_ranks


@pytest.mark.parametrize("recompute", ["none", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_quantized_step_gathers_a_block_at_a_time(recompute: Recompute, tmp_path: Path) -> None:
    """Each computes with the stored values of the whole matrices, to the bit, in forward and backward."""
    for found in run_ranks("gathered_ranks", "quantized_step", 2, tmp_path, recompute):
        assert not found["wrong"] and not found["left"]
        assert found["checked"]["forward"] > 20 and found["checked"]["backward"] > 20
        assert found["most"] <= found["largest"]
