"""`dsv4 train grpo` and `distill` of a plain folder: policy, engine, reference and teachers compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")
from dsv4.checkpoint import save_model, stored_format
from dsv4.config import nano_path
from dsv4.kernels import backends
from dsv4.post_training import grpo_run
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rewards import Reward
from recipes import distill, grpo
from tests.post_training.small_policy import small_policy

pytestmark = pytest.mark.skipif(backends.native_module() is None, reason="bits agree on the native kernels")
WORDS = (
    "problems.tasks=gcd", "run.steps=1", "sampling.prompts=2", "sampling.max_tokens=40", "sampling.max_model_len=512",
)  # fmt: skip


# Formats of the folder, whose values are not those that the official layout would store, and numerics of the run.
CASES = pytest.mark.parametrize(("plain", "numerics"), [("bf16", "float"), ("fp32", "shipped")], indirect=["plain"])


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in a plain format."""
    root = tmp_path_factory.mktemp("plain")
    model = small_policy()[0].model
    extras = sorted(tokenizer_files(nano_path(), root).iterdir())
    save_model(model, model.config, root / "model", format=request.param, extras=extras)
    assert stored_format(root / "model") == request.param
    return root / "model"


def first_step(run_dir: Path) -> dict:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])


@CASES
def test_the_kl_to_the_folder_that_a_run_began_with_is_exactly_0(
    numerics: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shipped numerics the engine, the learner and the reference all have FP4 indexers and FP8 activations."""
    monkeypatch.setattr(
        grpo_run, "judge", lambda rollouts, *_: [Reward(float(place % 2), False) for place in range(len(rollouts))]
    )
    words = [f"run.numerics={numerics}", "objective.kl=0.001", "objective.mini_batches=1"]
    assert grpo.main([str(plain), *WORDS, *words, "objective.group_size=2", "--run-dir", str(tmp_path)]) == 0
    line = first_step(tmp_path)
    assert line["updates"] == 1 and line["train_serve_difference"] == 0.0 and line["kl"] == 0.0


@CASES
def test_a_teacher_in_the_student_s_folder_teaches_exactly_nothing(numerics: str, plain: Path, tmp_path: Path) -> None:
    words = [f"run.numerics={numerics}", "run.balance=0", "run.indexer=0", "--teacher", f"default={plain}"]
    assert distill.main([str(plain), *WORDS, *words, "--run-dir", str(tmp_path)]) == 0
    line = first_step(tmp_path)
    assert line["train_serve_difference"] == line["loss"] == line["kl"] == line["grad_norm"] == 0.0
