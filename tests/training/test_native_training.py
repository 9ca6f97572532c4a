"""Training runs on the native kernels unless asked otherwise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.precision import Precision
from dsv4.training.loop import Stage, Trainer, TrainSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.schedule import Schedule

from .tiny_training import Rows, draw_documents, make_model

pytestmark = pytest.mark.skipif(backends.native_module() is None, reason="the native kernels are not built")


class Documents:
    def batch(self, step: int, /) -> Rows:
        return Rows(draw_documents(step, 140, 5, 33))


def train(folder: Path, steps: int = 1, precision: Precision = "fp32") -> list[float]:
    """Losses of some steps of a tiny model."""
    model, optimizer = make_model()
    settings = TrainSettings(Schedule(peak=0.02, warmup_steps=1), quantized_share=0.0, precision=precision)
    stages = [Stage("only", 1.0, Documents())]
    Trainer(model, optimizer, stages, settings, FixedPlan(steps), folder, quiet=True).run()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[str]]:
    """Operations that run on each set of kernels, counted from now on."""
    ran, decide = {name: Counter[str]() for name in backends.BACKENDS}, backends.uses_native

    def counted(operation: str, *tensors: Tensor | None) -> bool:
        native = decide(operation, *tensors)
        ran["native" if native else "reference"][operation] += 1
        return native

    monkeypatch.setattr(backends, "uses_native", counted)
    return ran


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_operation_of_a_training_step_runs_natively(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On AMX, torch's products of Newton-Schulz in BF16 run on the tiles, and ours do not.
    products = torch.zeros(2, 2, dtype=make_model()[1].compute_dtype)
    torchs = set[str]() if backends.uses_native("newton_schulz", products) else {"newton_schulz"}
    ran = runs(monkeypatch)
    train(tmp_path, precision=precision)
    assert ran["reference"].keys() == torchs
    # Shipped numerics alone have quant and hadamard; sinkhorn and topk are parts of others; nothing is sampled.
    others = {"quant", "hadamard", "sinkhorn", "topk", "sampling"}
    assert ran["native"].keys() == backends.NATIVE.keys() - others - torchs


def test_the_reference_can_be_forced_and_has_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, ran = train(tmp_path / "native", 3), runs(monkeypatch)
    monkeypatch.setenv("DSV4_KERNELS", "reference")
    monkeypatch.setattr(backends, "_choice", None)
    reference = train(tmp_path / "reference", 3)
    assert not ran["native"] and ran["reference"]
    assert reference == pytest.approx(native, rel=1e-4)
