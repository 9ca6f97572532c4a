"""`dsv4 train grpo` and `distill` killed at random points end with the bits of runs that nobody has disturbed."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from dsv4.training.export import export_model
from tests.post_training.small_policy import small_policy

pytest.importorskip("reasoning_gym")
from dsv4.config import nano_path
from dsv4.post_training.recipe_run import tokenizer_files
from recipes import distill, grpo

STEPS = 4
SHORT = (
    f"run.steps={STEPS}", "run.save_every=1", "sampling.prompts=2", "sampling.max_tokens=6",
    "sampling.max_model_len=512", "optimizer.rate=0.01", "problems.tasks=['gcd', 'number_sorting']",
)  # fmt: skip
BY_LENGTH = ("objective.group_size=4", "reward.length=1.0", "reward.free=0")  # rewards that differ for random answers
HANG = 300.0
TIMES = {
    *("seconds", "tokens_per_second", "sampling_seconds", "teaching_seconds", "staleness", "staleness_max"),
    *("stale_share", "worker_deaths"),
}
_processes = multiprocessing.get_context("forkserver")  # whose children need not import torch
_processes.set_forkserver_preload(["recipes.grpo", "recipes.distill", "dsv4.data.tasks", "torch._dynamo"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that ends its answers after a few tokens."""
    root = tmp_path_factory.mktemp("small")
    model = small_policy()[0].model
    with torch.no_grad():
        model.head.weight[1] *= 80.0  # the end-of-sentence token
    export_model(model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def start(recipe: str, words: list[str], run_dir: Path) -> BaseProcess:
    """The command in a process: the run's first call, or the one that goes on with it."""
    begun = (run_dir / "recipe.toml").exists()
    chosen = ["--resume"] if begun else words
    process = _processes.Process(
        target={"grpo": grpo, "distill": distill}[recipe].main, args=([*chosen, "--run-dir", str(run_dir)],)
    )
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(HANG)
    assert process.exitcode == 0


def kill_at_random(recipe: str, words: list[str], run_dir: Path, kills: int, seconds: float, seed: int) -> set[int]:
    """Kill a run `kills` times, each within `seconds`, and let it end; the steps at which it was killed."""
    rng, at = random.Random(seed), set[int]()
    for _ in range(kills):
        process = start(recipe, words, run_dir)
        process.join(rng.uniform(0.05, 1.0) * seconds)
        process.kill()
        process.join(HANG)
        assert process.exitcode in (0, -signal.SIGKILL)
        at.add(len(lines(run_dir)))
    finish(start(recipe, words, run_dir))
    return at


def lines(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in whole]


def model_bytes(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "model").iterdir()}


def check(recipe: str, words: list[str], tmp_path: Path, kills: int) -> None:
    """Compare a killed run with an undisturbed one."""
    started = time.monotonic()
    finish(start(recipe, words, tmp_path / "whole"))
    seconds = time.monotonic() - started
    assert kill_at_random(recipe, words, tmp_path / "killed", kills, 0.7 * seconds, seed=kills)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
    assert any(line.get("grad_norm", 0.0) > 0.0 for line in lines(tmp_path / "whole"))


def test_a_killed_grpo_run_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    check("grpo", [str(folder), *SHORT, *BY_LENGTH], tmp_path, kills=2)


def test_a_killed_distillation_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "--teacher", f"gcd={folder}", "--teacher", f"default={nano_path()}", *SHORT]
    check("distill", words, tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("recipe", ["grpo", "distill"])
def test_many_kills(recipe: str, folder: Path, tmp_path: Path) -> None:
    words = {"grpo": [*BY_LENGTH, "service.workers=2"], "distill": ["--teacher", f"default={nano_path()}"]}
    check(recipe, [str(folder), *SHORT, *words[recipe]], tmp_path, kills=6)
