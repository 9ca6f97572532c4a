"""The reference policy of GRPO's KL: replaced each so many steps, and the same after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4.checkpoint import load_model
from dsv4.config import nano_path
from dsv4.kernels import backends
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.rewards import RewardSettings
from dsv4.training.export import export_model
from dsv4.training.qat import as_stored
from dsv4.training.recipe import read_recipe
from dsv4.training.schedule import Schedule
from dsv4.training.state import StateError

from .small_policy import TextProblems, has_f, small_policy

LOOP = LoopSettings(steps=6, schedule=Schedule(0.05, 0, 0.0), prompts=2, max_tokens=6, save_every=1)
SETTINGS = GRPORunSettings(
    LearnerSettings(GRPOSettings(kl=0.1)), RewardSettings(judge_cut_off=True), group_size=4, mini_batches=1,
    reference_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def make_run(run_dir: Path, folder: Path, settings: GRPORunSettings = SETTINGS) -> GRPORun:
    policy, optimizer = small_policy()
    return GRPORun(policy, optimizer, TextProblems(has_f), LOOP, settings, run_dir, load_model(folder), quiet=True)


def head(run: GRPORun) -> torch.Tensor:
    assert run.reference is not None
    return torch.as_tensor(run.reference.model.head.matrix).detach().clone()


def kls(run_dir: Path) -> list[float | None]:
    """KL of each step, whose one update begins with the weights that sampled; None: of a step without one."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line.get("kl") for line in lines]


def test_the_reference_is_the_policy_of_the_last_multiple_of_reference_every(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, folder)
    served = [as_stored("head.weight", run.policy.model.head.weight.detach())]  # before each step
    for step in range(LOOP.steps):
        run.run(step + 1)
        assert torch.equal(head(run), served[step // 2 * 2]), step
        served.append(as_stored("head.weight", run.policy.model.head.weight.detach()))
    found = kls(tmp_path)
    assert all(kl is not None for kl in found)
    if backends.native_module() is not None:
        assert [kl == 0.0 for kl in found] == [True, False] * 3
    assert {path.name for path in tmp_path.glob("reference-*")} == {"reference-4.safetensors"}


def test_a_run_that_was_killed_goes_on_with_the_reference_of_its_state(folder: Path, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", folder)
    whole.run()
    for stop in (2, 3, 4, None):  # before the first replacement, within, before another
        run = make_run(tmp_path / "parts", folder)
        run.run(stop)
    assert torch.equal(head(run), head(whole)) and kls(tmp_path / "parts") == kls(tmp_path / "whole")
    want = dict(whole.policy.model.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in run.policy.model.named_parameters())
    (tmp_path / "parts" / "reference-4.safetensors").unlink()
    with pytest.raises(StateError, match=r"reference-4\.safetensors is missing"):
        make_run(tmp_path / "parts", folder)


def test_by_default_the_reference_stays(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, folder, replace(SETTINGS, reference_every=0))
    before = head(run)
    run.run(3)
    assert torch.equal(head(run), before) and not list(tmp_path.glob("reference-*"))


def test_a_reference_that_nothing_reads_or_a_negative_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"reference_every is 400 without kl; allowed: 0, or kl above 0"):
        read_recipe(GRPORecipe, None, ["objective.reference_every=400"])
    assert read_recipe(GRPORecipe, None, ["objective.reference_every=400", "objective.kl=0.001"]).settings() == replace(
        read_recipe(GRPORecipe, None, ["objective.kl=0.001"]).settings(), reference_every=400
    )
    with pytest.raises(ValueError, match=r"reference_every is -1; allowed: 0 \(never\), or more"):
        replace(SETTINGS, reference_every=-1)
