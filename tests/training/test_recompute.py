"""Activation checkpointing: by every policy the gradients, and all that a step counts, are those without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.analysis.activations import POLICIES, Recompute
from dsv4.model.attention import Attention
from dsv4.model.moe import MoE, expert_loads
from dsv4.training.anticipatory import predict_routing
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.gradient import Result, Work, compute_gradient, pack_batch, sum_counts
from dsv4.training.loop import TrainSettings
from dsv4.training.losses import LossWeights
from dsv4.training.schedule import Schedule

from .tiny_training import Rows, draw_documents, make_model


def step(policy: Recompute, attention: AttentionPhase = "sparse", ahead: bool = False) -> tuple[Result, dict[str, Any]]:
    """A step of two micro-batches: its result, gradients and expert loads."""
    model, _ = make_model()
    work = Work(
        *(0, 0, LossWeights(balance=0.1)), quantized=True, attention=attention, count_clamps=True, recompute=policy
    )
    batches = [pack_batch(Rows(draw_documents(seed, 150, 21)), torch.device("cpu")) for seed in (1, 2)]
    if ahead:
        other, _ = make_model(seed=5)
        routing = predict_routing(other, batches, work)
        batches = [
            type(batch)(batch.batch, batch.mask, batch.counts, chosen)
            for batch, chosen in zip(batches, routing, strict=True)
        ]
    result = compute_gradient(model, batches, work, sum_counts(batches))
    found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for number, load in enumerate(expert_loads(model)):
        found[f"load of the MoE {number}"] = torch.from_numpy(load)
    return result, found


def assert_same(left: tuple[Result, dict[str, Tensor]], right: tuple[Result, dict[str, Tensor]]) -> None:
    assert left[0].losses == right[0].losses
    for ours, theirs in ((left[1], right[1]), (left[0].loads, right[0].loads), (left[0].clamps, right[0].clamps)):
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_policy_has_the_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr("dsv4.kernels.backends.native_module", lambda: None)
    without = step("none")
    for policy in ("attention", "experts", "sublayers", "blocks"):
        assert_same(without, step(policy))


@pytest.mark.parametrize("attention", ["dense", "warmup"])
def test_blocks_run_again_in_every_phase(attention: AttentionPhase) -> None:
    assert_same(step("none", attention), step("blocks", attention))


def test_experts_chosen_ahead_are_those_of_the_second_forward() -> None:
    without = step("none", ahead=True)
    assert_same(without, step("blocks", ahead=True))
    assert without[0].losses != step("none")[0].losses


def test_the_parts_of_a_policy_run_twice_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[type] = Counter()

    def counted(kind: type, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            calls[kind] += 1
            return forward(*arguments)

        return run

    for kind in (Attention, MoE):
        monkeypatch.setattr(kind, "forward", counted(kind, kind.forward))
    seen = {}
    for policy in POLICIES:
        calls.clear()
        step(policy)
        seen[policy] = (calls[Attention], calls[MoE])
    once, twice = 8, 16  # three layers and the MTP block, two micro-batches
    assert seen == {
        "none": (once, once),
        "attention": (twice, once),
        "experts": (once, twice),
        "sublayers": (twice, twice),
        "blocks": (twice, twice),
    }


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute is 'all'; allowed: none, attention"):
        TrainSettings(Schedule(0.1, 1), recompute="all")
