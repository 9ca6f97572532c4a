"""Anticipatory Routing: experts chosen with earlier parameters, all else with those of the step."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.moe import MoE
from dsv4.model.transformer import Transformer
from dsv4.training.attention_phase import PHASES, AttentionPhase
from dsv4.training.batch_size import BatchSize
from dsv4.training.gradient import Result, Work
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.losses import following_ids
from dsv4.training.plan import FixedPlan
from dsv4.training.qat import stored_weights
from dsv4.training.replicas import Replicas
from dsv4.training.schedule import Schedule
from dsv4.training.stability_settings import StabilitySettings

from .tiny_training import CONFIG, Rows, draw_documents, make_model

STEPS = 6
SETTINGS = TrainSettings(
    Schedule(peak=0.05, warmup_steps=1, decay_fraction=0.5), balance_speed=0.05, quantized_share=0.34, save_every=2,
    micro_batches=2,
)  # fmt: skip


class Documents:
    """Documents of a stage; counts what it is asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.asked: list[int] = []

    def batch(self, step: int, /) -> Rows:
        self.asked.append(step)
        return Rows(draw_documents(self.seed + step, 30, 9))


def make_trainer(folder: Path, delay: int | None, **changes: Any) -> Trainer:
    """A trainer of six steps in two stages, always with Anticipatory Routing; delay None: without."""
    model, optimizer = make_model()
    stability = None if delay is None else StabilitySettings(anticipate="always", delay=delay)
    settings = replace(SETTINGS, stability=stability, **changes)
    stages = [Stage("first", 0.5, Documents(0)), Stage("second", 0.5, Documents(100))]
    return Trainer(model, optimizer, stages, settings, FixedPlan(STEPS), folder, quiet=True)


def make_ladder(folder: Path, delay: int | None, replicas: int = 1) -> Trainer:
    """As make_trainer, in stages of dense attention with a growing batch, of a warm-up, of sparse attention."""
    trainer = make_trainer(folder, delay, replicas=replicas, micro_batches=1, quantized_share=0.2)
    # Tokens of a micro-batch are counted for all replicas: of two, each takes half as many micro-batches.
    size = BatchSize(78, 2 // replicas)
    sizes = (BatchSize(78 * replicas, 4 // replicas, 2 // replicas, 150), size, size)
    attention: tuple[AttentionPhase, ...] = ("dense", "warmup", "sparse")
    trainer.stages = [
        Stage(phase, 1 / 3, Documents(100 * number), phase, size, rate=1e-3 if phase == "warmup" else None)
        for number, (phase, size) in enumerate(zip(attention, sizes, strict=True))
    ]
    assert set(attention) == set(PHASES)
    return trainer


def same_bits(left: Trainer, right: Trainer) -> bool:
    states = [[*t.model.state_dict().values(), *t.optimizer.momenta()] for t in (left, right)]
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    text = (trainer.run_dir / "metrics.jsonl").read_text()
    added = ("attempt", "anticipatory")
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k and k not in added}
        for line in text.splitlines()
    ]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_delay_0_is_ordinary_routing_bit_for_bit(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr("dsv4.kernels.backends.native_module", lambda: None)
    ordinary, ahead = make_trainer(tmp_path / "a", None), make_trainer(tmp_path / "b", 0)
    ordinary.run()
    ahead.run()
    assert same_bits(ordinary, ahead)
    assert lines(ordinary) == lines(ahead)


def test_delay_0_is_ordinary_routing_through_stages_and_ramps(tmp_path: Path) -> None:
    ordinary, ahead = (make_ladder(tmp_path / str(delay), delay) for delay in (None, 0))
    ordinary.run()
    ahead.run()
    assert same_bits(ordinary, ahead)
    assert lines(ordinary) == lines(ahead)


def test_a_delay_reaches_over_stages_and_ramps(tmp_path: Path) -> None:
    """Every batch is read once; a resumed run has the same bits, two processes have the same losses."""
    straight = make_ladder(tmp_path / "straight", 2)
    straight.run()
    counts = [len(stage.source.asked) for stage in straight.stages]
    assert [stage.source.asked for stage in straight.stages] == [[*range(count)] for count in counts]
    for stop in (1, 3, 4, 6):
        parts = make_ladder(tmp_path / "parts", 2)
        parts.run(stop_after=stop)
    assert same_bits(straight, parts)
    assert lines(straight) == lines(parts)
    together = make_ladder(tmp_path / "together", 2, replicas=2)
    together.run()
    assert counts == [6, 4, 4]
    for one, two in zip(lines(straight), lines(together), strict=True):
        assert [one[k] for k in ("loss", "targets")] == pytest.approx([two[k] for k in ("loss", "targets")], rel=5e-3)


def choices(model: Transformer, documents: list[list[int]], quantized: bool) -> dict[str, Tensor]:
    """Experts of each layer that a forward of the documents chooses."""
    batch, found = RaggedBatch.pack(documents), {}
    layers = [m for m in model.modules() if isinstance(m, MoE) and m.gate.tid2eid is None]

    def note(name: str) -> Any:
        return lambda gate, inputs, output: found.update({name: output[1]})

    hooks = [layer.gate.register_forward_hook(note(layer.name)) for layer in layers]
    with torch.no_grad(), stored_weights(model) if quantized else nullcontext():
        model.mtp_forward(model.forward_ragged(batch), following_ids(batch), batch)
    for hook in hooks:
        hook.remove()
    return found


def test_experts_are_chosen_with_the_parameters_of_delay_steps_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delay = 2
    trainer = make_trainer(tmp_path / "run", delay)
    states: list[dict[str, Tensor]] = []  # per step
    used: list[dict[str, Tensor]] = []  # per micro-batch
    gradient, forward = Replicas.gradient, trainer.model.forward_ragged

    def copying(replicas: Replicas, work: Work) -> list[Result]:
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return gradient(replicas, work)

    def noting(batch: RaggedBatch, cache: None = None, aux: AuxLosses | None = None) -> Tensor:
        if aux is not None:
            used.append(dict(aux.routing))
        return forward(batch, cache, aux)

    monkeypatch.setattr(Replicas, "gradient", copying)
    monkeypatch.setattr(trainer.model, "forward_ragged", noting)
    trainer.run()
    model, differ = make_model()[0], 0
    for step, state in enumerate(states):
        for micro in range(2):
            documents = trainer.stages[step // 3].source.batch(step % 3 * 2 + micro).documents
            quantized = step >= 4
            model.load_state_dict(states[max(0, step - delay)])
            before = choices(model, documents, quantized)
            model.load_state_dict(state)
            now = choices(model, documents, quantized)
            applied = used[step * 2 + micro]
            assert set(applied) == {"layers.1.ffn", "layers.2.ffn", "mtp.0.ffn"}
            for name, experts in applied.items():
                assert torch.equal(experts, before[name]), (step, micro, name)
                differ += not torch.equal(experts, now[name])
    assert differ  # the delay is seen


def test_loads_are_those_of_the_experts_that_ran() -> None:
    model, _ = make_model()
    batch = RaggedBatch.pack(draw_documents(1, 20))
    chosen = torch.tensor([[0, 3]]).expand(20, CONFIG.num_experts_per_tok).contiguous()
    aux = AuxLosses({"layers.2.ffn": chosen})
    model.forward_ragged(batch, aux=aux)
    assert aux.loads["layers.2.ffn"].tolist() == [20, 0, 0, 20]
    assert aux.loads["layers.1.ffn"].tolist() != [20, 0, 0, 20]


def test_replicas_equal_micro_batches(tmp_path: Path) -> None:
    alone = make_trainer(tmp_path / "alone", 1)
    alone.run()
    together = make_trainer(tmp_path / "together", 1, micro_batches=1, replicas=2)
    together.run()
    assert same_bits(alone, together)
