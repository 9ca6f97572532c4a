"""Stages: batch sizes that grow, dense attention, warm-up of the indexer, sparse attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.training.attention_phase import PHASES, AttentionPhase, attention_phase, trains
from dsv4.training.batch_size import BatchSize
from dsv4.training.gradient import Work, compute_gradient, pack_batch, sum_results
from dsv4.training.handover import take_state
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.losses import LossWeights
from dsv4.training.plan import FixedPlan
from dsv4.training.replicas import Replicas
from dsv4.training.schedule import Schedule
from dsv4.training.step_batches import Place

from .tiny_training import Rows, draw_documents, make_model

LADDER: tuple[AttentionPhase, ...] = ("dense", "warmup", "sparse")


class Counting:
    """Batches by number, which are noted."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int, /) -> Rows:
        self.asked.append(step)
        return Rows(draw_documents(step, 61, 40))


class SameBatch:
    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(0, 61, 40))


class Numbered:
    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(step, 61, 40))


def make_trainer(folder: Path, sizes: tuple[BatchSize | None, ...] = (None,) * 3, replicas: int = 1) -> Trainer:
    """Two steps in each phase."""
    model, optimizer = make_model()
    stages = [
        Stage(phase, 1 / 3, Counting(), phase, size, rate=1e-3 if phase == "warmup" else None)
        for phase, size in zip(LADDER, sizes, strict=True)
    ]
    settings = TrainSettings(
        Schedule(peak=0.02, warmup_steps=1), save_every=1, quantized_share=0.0, replicas=replicas, balance_speed=0.01
    )
    return Trainer(model, optimizer, stages, settings, FixedPlan(6), folder, quiet=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    momenta = {f"momentum of {n}": m for n, m in trainer.optimizer.state_dict()["muon"].items()}
    return {name: t.detach().clone() for name, t in (trainer.model.state_dict() | momenta).items()}


def gradients(phase: AttentionPhase, top_k: int) -> tuple[float, dict[str, Tensor]]:
    model, _ = make_model(index_topk=top_k)
    work = Work(0, 0, LossWeights(balance=0.01), quantized=False, attention=phase)
    result = compute_gradient(model, [pack_batch(Rows(draw_documents(1, 150, 61)), torch.device("cpu"))], work)
    return result.losses.next_token, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first, ramp", [(0, 0), (1, 1000), (2, 999), (5, 64)])
def test_a_batch_size_grows_linearly_with_the_tokens_seen(first: int, ramp: int) -> None:
    size = BatchSize(tokens=16, last=6, first=first, ramp_tokens=ramp)
    counts = [size.at(step) for step in range(60)]
    assert [size.before(step) for step in range(60)] == [sum(counts[:step]) for step in range(60)]
    assert counts == sorted(counts) and counts[0] == (first or 6) and counts[-1] == 6
    for step, count in enumerate(counts):
        seen = 16 * size.before(step)
        assert count == (6 if seen >= ramp else size.first + (6 - size.first) * seen // ramp)
    for tokens in (1, 16, 500, 1000, 1001, 4000):
        steps = size.steps(tokens)
        assert 16 * size.before(steps) >= tokens > 16 * size.before(steps - 1)


def test_no_batch_is_left_out_or_taken_twice_on_any_number_of_processes() -> None:
    size = BatchSize(tokens=8, last=5, first=2, ramp_tokens=200)
    for count in (1, 3):
        places = [Place(rank, count, 1) for rank in range(count)]
        numbers = [n for step in range(12) for place in places for n in place.numbers(step, size)]
        assert numbers == list(range(len(numbers)))
    constant = BatchSize(tokens=8, last=4)
    assert all(Place(1, 2, 4).numbers(s) == Place(1, 2, 1).numbers(s, constant) for s in range(9))


@pytest.mark.parametrize("values", [(0, 1), (1, 0), (1, 2, 3, 9), (1, 4, 2, 0), (1, 4, 4, 9)])
def test_a_wrong_batch_size_is_refused(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="allowed|a ramp has"):
        BatchSize(*values)


def test_dense_attention_reads_every_entry() -> None:
    """As sparse attention with room for all entries; the indexer has no gradient."""
    loss, found = gradients("dense", top_k=2)
    all_read, want = gradients("sparse", top_k=1000)
    assert loss == pytest.approx(all_read, rel=1e-6)
    assert abs(gradients("sparse", top_k=2)[0] - loss) > 1e-5
    assert found.keys() == {name for name in want if ".indexer." not in name}
    for name, gradient in found.items():
        assert torch.allclose(gradient, want[name], atol=1e-6), name


def test_the_warm_up_has_the_gradient_of_the_indexers_loss_alone() -> None:
    _, found = gradients("warmup", top_k=2)
    _, want = gradients("sparse", top_k=1000)
    assert found.keys() == {name for name in want if ".indexer." in name}
    for name, gradient in found.items():
        assert gradient.any() and torch.allclose(gradient, want[name], atol=1e-6), name


def test_each_phase_changes_its_parameters_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for number, phase in enumerate(LADDER):
        before = tensors(trainer)
        trainer.run(stop_after=2 * (number + 1))
        after = tensors(trainer)
        for name, tensor in after.items():
            moved = not torch.equal(tensor, before[name])
            if not trains(phase, name):
                assert not moved, (phase, name)
            elif "weight" in name and (".indexer." in name or "embed" in name):
                assert moved, (phase, name)
    rows = metrics(tmp_path)
    assert [row["stage"] for row in rows] == [phase for phase in LADDER for _ in range(2)]
    assert [row["indexer_loss"] > 0 for row in rows] == [False, False, True, True, True, True]
    assert [row["lr"] for row in rows[2:4]] == [1e-3, 1e-3]


def test_a_warm_up_lowers_the_indexers_loss(tmp_path: Path) -> None:
    model, optimizer = make_model()
    stages = [Stage("warmup", 1.0, SameBatch(), "warmup", rate=0.005)]
    settings = TrainSettings(Schedule(peak=1.0, warmup_steps=0), quantized_share=0.0)
    Trainer(model, optimizer, stages, settings, FixedPlan(20), tmp_path, quiet=True).run()
    losses = [row["indexer_loss"] for row in metrics(tmp_path)]
    assert losses[-1] < 0.95 * losses[0]


def test_a_run_through_all_phases_and_a_ramp_resumes_to_the_same_bits(tmp_path: Path) -> None:
    sizes = (BatchSize(100, 3, 1, 200), None, BatchSize(100, 2))
    straight = make_trainer(tmp_path / "straight", sizes)
    straight.run()
    assert [stage.source.asked for stage in straight.stages] == [[0, 1, 2], [0, 1], [0, 1, 2, 3]]
    for stop in range(1, 7):
        make_trainer(tmp_path / "parts", sizes).run(stop_after=stop)
    resumed, want = tensors(make_trainer(tmp_path / "parts", sizes)), tensors(straight)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in want.items())


def test_a_run_handed_to_ranks_and_back_in_every_phase_has_the_same_bits(tmp_path: Path) -> None:
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    for stop in range(1, 7):
        make_trainer(tmp_path / "parts").run(stop_after=stop)
        take_state(tmp_path / "parts", make_model()[0], {})
        assert not (tmp_path / "parts" / "state.pt").exists()
    found, want = tensors(make_trainer(tmp_path / "parts")), tensors(straight)
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


def test_updates_of_a_dense_stage_are_not_those_of_indexers() -> None:
    _, optimizer = make_model()
    for _ in range(5):
        optimizer.step(0.01, attention="dense")
    assert optimizer.updates() == {"dense": 5, "warmup": 0, "sparse": 0}
    optimizer.start_adamw(optimizer.updates())
    for name, parameter in optimizer.parameters.items():
        state = optimizer._adamw.state.get(parameter)
        assert not state or state["step"] == (0 if ".indexer." in name else 5), name


@pytest.mark.parametrize("phase", PHASES)
def test_two_processes_equal_one_in_every_phase(phase: AttentionPhase) -> None:
    found = []
    for count in (1, 2):
        model, optimizer = make_model()
        size = BatchSize(100, 2 // count)
        with Replicas(model, optimizer, [Numbered()], count=count) as replicas:
            result = sum_results(replicas.gradient(Work(0, 0, LossWeights(), False, attention=phase, size=size)))
            replicas.update(0.01, 1.0, phase)
        found.append((result.losses, model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name


def test_a_model_without_indexers_cannot_warm_one_up() -> None:
    model, _ = make_model(compress_ratios=(0, 0, 128, 0))
    with pytest.raises(ValueError, match="no layer of this model has one"), attention_phase(model, "warmup"):
        pass
    with attention_phase(model, "dense"):
        pass
