"""The recipes of post-training on a GPU: on a real one, and on one that is simulated, where nothing may mix devices."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")

from dsv4.config import nano_path
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.training.export import export_model
from dsv4.training.speed import SIDE
from recipes import distill, grpo, sft
from tests.post_training.small_policy import small_policy
from tests.simulated_cuda import simulated_cuda

SHORT = ("run.device=cuda", "run.steps=1", "sampling.prompts=2", "sampling.max_tokens=3", "sampling.max_model_len=512")
TASKS = "problems.tasks=['gcd', 'number_sorting']"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=["simulated", pytest.param("real", marks=GPU)], autouse=True)
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    if request.param == "real":
        yield
        return
    found = {
        "is_available": True, "device_count": 1, "get_device_name": "simulated", "mem_get_info": (1 << 34, 1 << 34),
        "get_rng_state_all": [], "set_rng_state_all": None, "synchronize": None, "max_memory_allocated": 0,
    }  # fmt: skip
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setitem(SIDE, "cuda", 64)  # of the products that are timed, for a GPU's speed
    with simulated_cuda():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder."""
    root = tmp_path_factory.mktemp("small")
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def test_grpo(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), TASKS, *SHORT, "objective.group_size=2", "objective.kl=0.01"]
    assert grpo.main([*words, "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("estimate", ["full", "sampled"])
def test_distillation(estimate: str, folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "--teacher", f"default={folder}", TASKS, *SHORT, f"distillation.estimate={estimate}"]
    assert distill.main([*words, "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0


def test_fine_tuning(folder: Path, tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "1"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    words = [str(folder), str(tmp_path / "talks.jsonl"), "run.device=cuda", "run.recompute=blocks"]
    words += ["stages.0.row_tokens=64", "stages.0.batch_tokens=64", "stages.0.tokens=64", "--max-tokens", "64"]
    assert sft.main([*words, "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
