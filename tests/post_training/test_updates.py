"""Updates of GRPO and distillation: their gradient does not depend on how documents are packed into micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.config import nano_path
from dsv4.model.transformer import Transformer
from dsv4.post_training.distillation import DistillationRun, DistillationSettings
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.learner import Judged, LearnerSettings, update
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.post_training.updates import UpdateError, UpdateSettings, take_step
from dsv4.training.export import export_model
from dsv4.training.schedule import Schedule

from .small_policy import TextProblems, has_f, small_policy

LENGTHS = (6, 150, 9, 61)  # the first and the third see hardly an entry that the indexer would choose
PACKED = (1000, 160, 1)  # all in one, two by two, each by itself


def rollouts() -> list[Rollout]:
    found: list[Rollout] = []
    for length in LENGTHS:
        drawn = torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        found.append(Rollout(0, tuple(drawn[:3]), tuple(drawn[3:]), (-5.0,) * (length - 3), "", True))
    return found


def gradient(model: Transformer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def of_grpo(micro_tokens: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Gradient of the losses of routers and indexers alone: no answer is better than another."""
    policy, optimizer = small_policy()
    found: list[Tensor] = []
    monkeypatch.setattr(optimizer, "step", lambda *_: found.append(gradient(policy.model)))
    settings = LearnerSettings(GRPOSettings(), micro_tokens=micro_tokens, balance=1.0, indexer=1.0)
    update(policy.model, optimizer, [Judged(one, 0.0) for one in rollouts()], 0.1, settings)
    return found[0]


def of_distillation(micro_tokens: int, folder: Path, run_dir: Path) -> Tensor:
    """The same, since the teacher is the student, of two teachers with two documents each."""
    policy, optimizer = small_policy()
    teachers = Teachers(dict.fromkeys("ab", Teacher(folder)), run_dir / "hidden", policy.model.config.vocab_size)
    settings = DistillationSettings(micro_tokens=micro_tokens, balance=1.0, indexer=1.0)
    loop = LoopSettings(1, Schedule(0.1, 0, 0.0))
    run = DistillationRun(policy, optimizer, TextProblems(has_f), teachers, loop, settings, run_dir, quiet=True)
    one, two, three, four = rollouts()
    by_teacher = {"a": [one, two], "b": [three, four]}
    teachers.store(by_teacher, micro_tokens)
    run.add_gradient(by_teacher)
    return gradient(policy.model)


def test_grpo_weighs_the_losses_of_routers_and_indexers_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, *parts = (of_grpo(tokens, monkeypatch) for tokens in PACKED)
    for part in parts:
        assert float((part - whole).norm()) < 1e-4 * float(whole.norm())


def test_distillation_weighs_the_losses_of_routers_and_indexers_by_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), tmp_path), folder)
    whole, *parts = (of_distillation(tokens, folder, tmp_path / str(tokens)) for tokens in PACKED)
    for part in parts:
        assert float((part - whole).norm()) < 1e-4 * float(whole.norm())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    policy, optimizer = small_policy()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.model.head.weight.grad = torch.full_like(policy.model.head.weight, 1e-3)
    with pytest.raises(UpdateError, match=r"loss nan, gradient norm .*: not finite; nothing was updated"):
        take_step(optimizer, float("nan"), 0.1, UpdateSettings())
    policy.model.head.weight.grad = torch.full_like(policy.model.head.weight, torch.inf)
    with pytest.raises(UpdateError, match="loss 1.0, gradient norm inf"):
        take_step(optimizer, 1.0, 0.1, UpdateSettings())
    assert policy.model.head.weight.grad is None or not policy.model.head.weight.grad.any()
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"), [({"micro_tokens": 0}, "micro_tokens is 0"), ({"grad_clip": 0.0}, "grad_clip is 0.0")]
)
def test_settings_of_updates_that_are_not_allowed_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateSettings(**settings)
