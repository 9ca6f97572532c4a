"""Ranks that build only their own pieces of a model begin with the bits of one process, and export its files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.analysis.inventory import tensor_inventory
from dsv4.checkpoint import save_model
from dsv4.training.export import export_model

from ..training.tiny_training import CONFIG, make_model
from .ranks import run_ranks


def check_start(folder: Path, degrees: dict[str, int]) -> None:
    model, _ = make_model()
    save_model(model, model.config, folder / "start", "fp32")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    export_model(model, folder / "tokenizer", folder / "alone")
    count = math.prod(degrees.values())
    assert run_ranks("piece_ranks", "start", count, folder, degrees) == [[]] * count
    want = {path.name: path.read_bytes() for path in (folder / "alone").iterdir()}
    assert len(want) == 4
    for name in ("drawn", "read"):
        assert {path.name: path.read_bytes() for path in (folder / f"{name}-ranks").iterdir()} == want


@pytest.mark.parametrize("degrees", [{"data": 2}, {"expert": 2}])
def test_two_ranks_begin_and_end_with_the_bits_of_one_process(degrees: dict[str, int], tmp_path: Path) -> None:
    check_start(tmp_path, degrees)


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [
        {"pipeline": 2},
        {"context": 2},
        {"data": 4},
        {"expert": 4},
        {"data": 2, "expert": 2},
        {"pipeline": 2, "expert": 2},
        {"pipeline": 2, "data": 2},
        {"context": 2, "expert": 2},
    ],
)
def test_ranks_begin_and_end_with_the_bits_of_one_process(degrees: dict[str, int], tmp_path: Path) -> None:
    check_start(tmp_path, degrees)


def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    config = replace(CONFIG, n_routed_experts=16, moe_intermediate_size=64)
    whole = sum(spec.num_bytes for spec in tensor_inventory(config, "fp32"))
    (tmp_path / "tokenizer").mkdir()
    for started, exported in run_ranks("piece_ranks", "measure", 2, tmp_path, {"expert": 2}, config):
        assert started < 0.6 * whole  # half of the experts and of the rest, and a matrix
        assert exported < 0.2 * whole  # besides these
