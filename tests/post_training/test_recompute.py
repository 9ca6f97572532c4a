"""Activation checkpointing in GRPO and distillation: the same bits by every policy, and less kept of a long episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4.analysis.activations import POLICIES, Recompute
from dsv4.config import nano_path
from dsv4.post_training.distillation import DistillationRun, DistillationSettings
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.learner import Judged, LearnerSettings, update
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.recipes import DistillRecipe, EpisodesSection, GRPORecipe, RunSection, SamplingSection
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.training.export import export_model
from dsv4.training.schedule import Schedule

from .small_policy import TextProblems, has_f, small_policy


def rollout(tokens: int, seed: int) -> Rollout:
    """A document of which the second half was sampled."""
    drawn = torch.randint(5, 300, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    half = tokens // 2
    return Rollout(0, tuple(drawn[:half]), tuple(drawn[half:]), (-5.0,) * (tokens - half), "", True)


def updated(policy: Recompute, rollouts: list[Rollout]) -> dict[str, Tensor]:
    """Weights after an update of GRPO in two micro-batches, and its figures."""
    served, optimizer = small_policy()
    settings = LearnerSettings(GRPOSettings(kl=0.0, off_policy_bound=None), micro_tokens=200, recompute=policy)
    batch = [Judged(one, (1.0, -0.5)[place % 2]) for place, one in enumerate(rollouts)]
    found = update(served.model, optimizer, batch, 0.01, settings)
    weights = {name: parameter.detach() for name, parameter in served.model.named_parameters()}
    return weights | {"norm": torch.tensor(found.grad_norm), "loss": torch.tensor(found.loss)}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_grpo_has_the_same_bits_by_every_policy() -> None:
    rollouts = [rollout(n, seed=n) for n in (141, 37, 90)]
    without = updated("none", rollouts)
    assert without["norm"] > 0.0
    for policy in POLICIES[1:]:
        assert_same(without, updated(policy, rollouts))


def test_distillation_has_the_same_bits_by_every_policy(tmp_path: Path) -> None:
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), tmp_path), tmp_path / "teacher")
    rollouts = [rollout(n, seed=n) for n in (141, 37)]
    loop = LoopSettings(1, Schedule(0.01, 0, 0.0))
    found: list[dict[str, Tensor]] = []
    for policy in POLICIES:
        served, optimizer = small_policy()
        with torch.no_grad():
            served.model.norm.weight.mul_(2.0)  # not the teacher, of which there would be nothing to learn
        teacher, vocab = {"default": Teacher(tmp_path / "teacher")}, len(served.model.head.matrix)
        teachers = Teachers(teacher, tmp_path / "hidden", vocab)
        settings = DistillationSettings(micro_tokens=150, recompute=policy)
        run = DistillationRun(
            served, optimizer, TextProblems(has_f), teachers, loop, settings, tmp_path / policy, quiet=True
        )
        teachers.store({"default": rollouts}, settings.micro_tokens)
        run.add_gradient({"default": rollouts})
        found.append({name: p.grad for name, p in served.model.named_parameters() if p.grad is not None})
    assert found[0]
    for gradients in found[1:]:
        assert_same(found[0], gradients)


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that were made in this context and still live."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def living(self) -> int:
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        return sum(size for _, size in self._made.values())


def kept(policy: Recompute, tokens: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that an episode of `tokens` tokens keeps from its forward to its backward, weights included."""
    seen: list[int] = []
    backward = Tensor.backward
    with Memory() as memory, monkeypatch.context() as patch:

        def noted(loss: Tensor) -> None:
            seen.append(memory.living())
            backward(loss)

        patch.setattr(Tensor, "backward", noted)
        updated(policy, [rollout(tokens, seed=1)])
    (found,) = seen
    return found


def test_a_longer_episode_keeps_little_more_than_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def growth(policy: Recompute) -> float:
        """Bytes per token."""
        return (kept(policy, 768, monkeypatch) - kept(policy, 256, monkeypatch)) / 512

    config = small_policy()[0].model.config
    streams = config.num_hidden_layers * config.hc_mult * config.hidden_size * 4
    assert growth("blocks") < 2 * streams < 0.3 * growth("none")


def test_an_episode_is_as_long_as_its_context() -> None:
    """Unless a recipe says fewer tokens; and both recipes hand on how it is recomputed."""
    run, sampling = RunSection(recompute="blocks"), SamplingSection(max_model_len=40000)
    recipe = DistillRecipe(run=run, sampling=sampling)
    assert recipe.settings().episodes.tokens == 40000 and recipe.settings().recompute == "blocks"
    grpo = GRPORecipe(run=run, episodes=EpisodesSection(tokens=7))
    assert grpo.settings().episodes.tokens == 7 and grpo.settings().learner.recompute == "blocks"
    assert GRPORecipe().settings().episodes.tokens == GRPORecipe().sampling.max_model_len
