"""Several gloo ranks train as one process does with all their batches."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.analysis.degrees import Degrees
from dsv4.checkpoint import load_model, save_model
from dsv4.checkpoint.adapter_files import Pair
from dsv4.training import rank_loop
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.export import export_adapter
from dsv4.training.loop import Trainer
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import FixedPlan

from .rank_program import STEPS, TARGETS, hurt, make_stages, make_start, settings

ROOT = Path(__file__).parents[2]
LOSSES = ("loss", "mtp_loss", "balance_loss", "indexer_loss", "grad_norm")


def train(
    run_dir: Path,
    ranks: int,
    micro_batches: int,
    stop_after: int | None = None,
    changes: dict[str, Any] | None = None,
    phases: Sequence[AttentionPhase] = ("sparse",),
    lora: str | None = None,
    hurt_at: int | None = None,
    targets: Sequence[str] = TARGETS,
    *,
    degrees: dict[str, int],
) -> None:
    """changes: of the run's TrainSettings."""
    options = {
        "run_dir": str(run_dir), "degrees": degrees, "micro_batches": micro_batches, "stop_after": stop_after,
        "changes": changes or {}, "phases": phases, "lora": lora, "hurt_at": hurt_at,
        "targets": targets,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*command, "-m", "tests.parallel.rank_program", json.dumps(options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "whole.pt")


def train_alone(
    run_dir: Path,
    micro_batches: int,
    phases: Sequence[AttentionPhase] = ("sparse",),
    lora: str | None = None,
    changes: dict[str, Any] | None = None,
    hurt_at: int | None = None,
    targets: Sequence[str] = TARGETS,
    stop_after: int | None = None,
) -> list[dict[str, Any]]:
    model, chosen_optimizer = make_start(lora, targets)
    optimizer = MuonAdamW(model, model.config, **chosen_optimizer)
    chosen = settings(micro_batches=micro_batches, **(changes or {}))
    trainer = Trainer(model, optimizer, make_stages(phases), chosen, FixedPlan(STEPS), run_dir, quiet=True)
    if hurt_at is not None:
        trainer.run(hurt_at)
        hurt(trainer)
    trainer.run(stop_after)
    return records(run_dir)


def assert_same_losses(found: list[dict[str, Any]], want: list[dict[str, Any]], first: int = 0) -> None:
    assert [record["step"] for record in found] == list(range(first, STEPS))
    for got, expected in zip(found, want, strict=True):
        assert got["targets"] == expected["targets"] and got["tokens"] == expected["tokens"]
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6), got["step"]
        for name in LOSSES[1:]:
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (got["step"], name)


STAGES: tuple[AttentionPhase, ...] = ("dense", "warmup", "sparse")


def test_two_ranks_with_halved_experts_train_every_phase_as_one_process(tmp_path: Path) -> None:
    train(tmp_path / "ranks", 2, 1, phases=STAGES, degrees={"expert": 2})
    assert_same_losses(records(tmp_path / "ranks"), train_alone(tmp_path / "alone", 2, STAGES))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "degrees"),
    [
        (2, 1, {"data": 2}),
        (2, 2, {"context": 2}),
        (2, 3, {"pipeline": 2}),
        (4, 2, {"pipeline": 2, "data": 2}),
    ],
)
def test_ranks_train_every_phase_as_one_process(
    ranks: int, micro_batches: int, degrees: dict[str, int], tmp_path: Path
) -> None:
    train(tmp_path / "ranks", ranks, micro_batches, phases=STAGES, degrees=degrees)
    all_batches = ranks // degrees.get("context", 1) // degrees.get("pipeline", 1) * micro_batches
    assert_same_losses(records(tmp_path / "ranks"), train_alone(tmp_path / "alone", all_batches, STAGES))


# As the recipe of such a run sets them: router biases and stored values stay as they are.
LORA: dict[str, Any] = {"quantized_share": 0.0, "balance_speed": 0.0}


def test_two_ranks_train_adapters_as_one_process(tmp_path: Path) -> None:
    train(tmp_path / "ranks", 2, 1, changes=LORA, lora="adamw_no_decay", degrees={"data": 2})
    alone = train_alone(tmp_path / "alone", 2, lora="adamw_no_decay", changes=LORA)
    assert_same_losses(records(tmp_path / "ranks"), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batches", "degrees", "optimizer"),
    [
        (2, {"context": 2}, "muon"),
        (3, {"pipeline": 2}, "adamw_no_decay"),
        (2, {"pipeline": 2, "data": 2}, "muon"),
        (1, {"expert": 2}, "muon"),
        (1, {"expert": 2, "data": 2}, "adamw_no_decay"),
        (2, {"expert": 2, "pipeline": 2}, "muon"),
        (1, {"expert": 2, "context": 2}, "adamw_no_decay"),
    ],
)
def test_ranks_train_adapters_as_one_process(
    micro_batches: int, degrees: dict[str, int], optimizer: str, tmp_path: Path
) -> None:
    """And resumed on the same ranks they have the same bits."""
    ranks = math.prod(degrees.values())
    for name, ends in (("whole", (None,)), ("parts", (3, None))):
        for end in ends:
            train(tmp_path / name, ranks, micro_batches, end, LORA, lora=optimizer, degrees=degrees)
    batches = degrees.get("data", 1) * degrees.get("expert", 1) * micro_batches
    alone = train_alone(tmp_path / "alone", batches, lora=optimizer, changes=LORA)
    assert_same_losses(records(tmp_path / "whole"), alone)
    want, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert len(want) > 10 and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("targets", [TARGETS, ["experts"]])
def test_two_ranks_with_halved_experts_train_adapters_as_one_process(targets: list[str], tmp_path: Path) -> None:
    degrees, lora = {"expert": 2}, "adamw_no_decay"
    train(tmp_path / "ranks", 2, 1, None, LORA, lora=lora, targets=targets, degrees=degrees)
    alone = train_alone(tmp_path / "alone", 2, lora=lora, changes=LORA, targets=targets)
    assert_same_losses(records(tmp_path / "ranks"), alone)


def test_adapters_are_gathered_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other ranks would come on other GPUs, which no operation mixes."""

    class OnGpu:
        def cpu(self) -> torch.Tensor:
            return torch.ones(2, 3)

    def gather(pairs: dict[str, Pair], group: object) -> list[dict[str, Pair]]:
        assert all(isinstance(tensor, torch.Tensor) for pair in pairs.values() for tensor in pair)
        return [pairs, pairs]

    names = ("layers.0.attn.wq_a", "layers.0.ffn.experts.w1")
    monkeypatch.setattr(rank_loop, "adapter_pairs", lambda _: {name: Pair(OnGpu(), OnGpu()) for name in names})  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(rank_loop, "gather_objects", gather)
    for degrees in ({"expert": 2}, {"pipeline": 2}, {"data": 2}):
        pipeline = SimpleNamespace(group=None) if "pipeline" in degrees else None
        trainer: Any = SimpleNamespace(
            model=None, degrees=Degrees(**degrees), mesh=SimpleNamespace(get_group=lambda _: None),
            parts=SimpleNamespace(pipeline=pipeline),
        )  # fmt: skip
        found = rank_loop.RankTrainer.gather_adapters(trainer)
        assert list(found) == list(names) and all(isinstance(t, torch.Tensor) for pair in found.values() for t in pair)
        assert len(found[names[1]].a) == (4 if "expert" in degrees else 2)


@pytest.mark.slow
def test_adapters_go_on_with_other_parts_of_the_experts(tmp_path: Path) -> None:
    """And in one process; the files of the last are those of a run without stops."""
    for ranks, micro_batches, end in ((2, 2, 2), (4, 1, 4), (1, 4, None)):
        degrees = {"expert": ranks}
        train(tmp_path / "ranks", ranks, micro_batches, end, LORA, lora="muon", degrees=degrees)
    assert_same_losses(records(tmp_path / "ranks"), train_alone(tmp_path / "alone", 4, lora="muon", changes=LORA))


@pytest.mark.slow
def test_ranks_with_halved_experts_export_the_adapters_of_one_process(tmp_path: Path) -> None:
    train(tmp_path / "ranks", 2, 1, 3, LORA, lora="muon", degrees={"expert": 2})
    train(tmp_path / "one", 1, 2, 3, LORA, lora="muon", degrees={})
    model, _ = make_start(None)
    save_model(model, model.config, tmp_path / "base", format="transformers")
    found: list[dict[str, torch.Tensor]] = []
    for run in ("ranks", "one"):
        whole = weights(tmp_path / run)
        pairs = {name[:-2]: Pair(whole[name], whole[f"{name[:-2]}.B"]) for name in whole if name.endswith(".A")}
        out = tmp_path / f"{run}-merged"
        export_adapter(pairs, LoraSettings(3, 6.0, TARGETS), tmp_path / "base", tmp_path / f"{run}-adapter", out)
        found.append(load_model(out, weights="widened").state_dict())
    got, want = found
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        if re.search(r"layers\.\d+\.ffn\.experts\.w", name):  # every expert has learnt
            assert all((tensor != model.state_dict()[name]).flatten(1).any(1))


ROLLBACK: dict[str, Any] = {"stability": True, "quantized_share": 0.0}


def assert_same_rollback(found: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """Weights damaged before step 4: back to step 2, and on with Anticipatory Routing up to step 6."""
    (event,) = [record for record in found if record.get("event") == "rollback"]
    assert (event["step"], event["to"], event["anticipatory_until"]) == (4, 2, 6)
    assert_same_losses([record for record in found if record.get("attempt") == 1], want[-4:], first=2)
    assert [record["anticipatory"] for record in found[-4:]] == [True] * 4


def test_two_ranks_roll_back_as_one_process(tmp_path: Path) -> None:
    train(tmp_path / "ranks", 2, 1, changes=ROLLBACK, hurt_at=4, degrees={"data": 2})
    assert_same_rollback(records(tmp_path / "ranks"), train_alone(tmp_path / "alone", 2, changes=ROLLBACK, hurt_at=4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [{"expert": 2}, {"context": 2}, {"data": 2, "context": 2}, {"pipeline": 2}, {"pipeline": 2, "context": 2}],
)
def test_ranks_roll_back_as_one_process(degrees: dict[str, int], tmp_path: Path) -> None:
    """And resumed within Anticipatory Routing, whose choices the checkpoint has, they have the same bits."""
    ranks = math.prod(degrees.values())
    train(tmp_path / "whole", ranks, 2, changes=ROLLBACK, hurt_at=4, degrees=degrees)
    train(tmp_path / "parts", ranks, 2, stop_after=5, changes=ROLLBACK, hurt_at=4, degrees=degrees)
    train(tmp_path / "parts", ranks, 2, changes=ROLLBACK, degrees=degrees)
    batches = 2 * ranks // degrees.get("context", 1) // degrees.get("pipeline", 1)
    alone = train_alone(tmp_path / "alone", batches, changes=ROLLBACK, hurt_at=4)
    for name in ("whole", "parts"):
        assert_same_rollback(records(tmp_path / name), alone)
    want, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.slow
def test_a_run_resumed_after_its_warmup_has_the_same_bits(tmp_path: Path) -> None:
    """AdamW's parameters of the indexer have taken other steps than the rest."""
    train(tmp_path / "whole", 2, 1, phases=STAGES, degrees={"data": 2})
    train(tmp_path / "parts", 2, 1, stop_after=4, phases=STAGES, degrees={"data": 2})
    train(tmp_path / "parts", 2, 1, phases=STAGES, degrees={"data": 2})
    want = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "degrees"),
    [
        (2, 2, {"data": 2}),
        (2, 1, {"expert": 2}),
        (4, 1, {"data": 4}),
        (4, 1, {"expert": 4}),
        (4, 1, {"data": 2, "expert": 2}),
        (2, 2, {"context": 2}),
        (4, 1, {"context": 2, "expert": 2}),
        (4, 1, {"context": 2, "data": 2}),
        (2, 3, {"pipeline": 2}),
        (4, 2, {"pipeline": 2, "context": 2}),
        (4, 2, {"pipeline": 2, "data": 2}),
        (4, 1, {"pipeline": 2, "expert": 2}),
    ],
)
def test_ranks_train_as_one_process(ranks: int, micro_batches: int, degrees: dict[str, int], tmp_path: Path) -> None:
    train(tmp_path / "ranks", ranks, micro_batches, None, None, degrees=degrees)
    all_batches = ranks // degrees.get("context", 1) // degrees.get("pipeline", 1) * micro_batches
    assert_same_losses(records(tmp_path / "ranks"), train_alone(tmp_path / "alone", all_batches))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "degrees", "changes"),
    [
        (2, 2, {"data": 2}, {"precision": "bf16"}),
        (2, 3, {"pipeline": 2}, {"precision": "fp8"}),
        (2, 2, {"data": 2}, {"recompute": "blocks"}),
        (2, 1, {"expert": 2}, {"recompute": "experts"}),
        (2, 2, {"context": 2}, {"recompute": "attention"}),
        (2, 3, {"pipeline": 2}, {"recompute": "blocks"}),
    ],
)
def test_ranks_with_a_precision_or_recomputation_train_as_one_process(
    ranks: int, micro_batches: int, degrees: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Rounding amplifies differences of later steps, whose weights differ in their last bits already."""
    train(tmp_path / "ranks", ranks, micro_batches, None, changes, degrees=degrees)
    all_batches = ranks // degrees.get("context", 1) // degrees.get("pipeline", 1) * micro_batches
    alone = train_alone(tmp_path / "alone", all_batches, changes=changes)
    for step, (got, want) in enumerate(zip(records(tmp_path / "ranks"), alone, strict=True)):
        rounded = "precision" in changes and step > 0
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-3 if rounded else 1e-6), step


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_and_other_ranks_the_same_losses(tmp_path: Path) -> None:
    train(tmp_path / "whole", 2, 2, degrees={"data": 2})
    train(tmp_path / "parts", 2, 2, stop_after=3, degrees={"data": 2})
    train(tmp_path / "parts", 2, 2, degrees={"data": 2})
    want = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, want[name]), name
    exact = {"quantized_share": 0.0}  # rounding to FP4 makes other choices of entries out of last bits
    train(tmp_path / "others", 2, 2, 3, exact, degrees={"data": 2})
    train(tmp_path / "others", 4, 1, None, exact, degrees={"data": 2, "expert": 2})
    assert_same_losses(records(tmp_path / "others"), train_alone(tmp_path / "alone", 4, changes=exact))


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages_and_parts(tmp_path: Path) -> None:
    train(tmp_path / "ranks", 2, 2, stop_after=3, degrees={"pipeline": 2})
    train(tmp_path / "ranks", 2, 2, degrees={"context": 2})
    assert_same_losses(records(tmp_path / "ranks"), train_alone(tmp_path / "alone", 2))


def test_a_run_goes_on_between_one_process_and_ranks(tmp_path: Path) -> None:
    """Through all phases, whose steps AdamW counts apart: the losses of a run without stops."""
    want = train_alone(tmp_path / "alone", 2, STAGES)
    train_alone(tmp_path / "moved", 2, STAGES, stop_after=3)
    train(tmp_path / "moved", 2, 1, stop_after=5, phases=STAGES, degrees={"data": 2})
    assert not (tmp_path / "moved" / "state.pt").exists()
    assert_same_losses(train_alone(tmp_path / "moved", 2, STAGES), want)
    assert not (tmp_path / "moved" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["muon", "adamw_no_decay"])
def test_adapters_go_on_between_one_process_and_ranks(lora: str, tmp_path: Path) -> None:
    want = train_alone(tmp_path / "alone", 2, lora=lora, changes=LORA)
    train(tmp_path / "moved", 2, 1, 2, LORA, lora=lora, degrees={"expert": 2})
    train_alone(tmp_path / "moved", 2, lora=lora, changes=LORA, stop_after=4)
    train(tmp_path / "moved", 2, 1, None, LORA, lora=lora, degrees={"expert": 2})
    assert_same_losses(records(tmp_path / "moved"), want)
