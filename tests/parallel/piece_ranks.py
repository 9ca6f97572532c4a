"""Runs of test_pieces.py on one rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from dsv4.analysis.degrees import Degrees
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.parallel.fsdp import local_part
from dsv4.parallel.pieces import Values
from dsv4.training import rank_loop
from dsv4.training.export import export_tensors
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from dsv4.training.start import declare_model, drawn_values, folder_values
from tests.parallel.rank_program import STEPS, make_stages, make_start, settings
from tests.training.tiny_training import CONFIG, SEED


def make_trainer(
    folder: Path, degrees: dict[str, int], config: ModelConfig = CONFIG, values: Values | None = None
) -> RankTrainer:
    """values: None: the model is built whole."""
    model = make_start(None)[0] if values is None else declare_model(config)
    return RankTrainer(
        model, {}, make_stages(["sparse"]), settings(), FixedPlan(STEPS), folder, Degrees(**degrees), quiet=True,
        values=values,
    )  # fmt: skip


def parts(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: local_part(p) for name, p in model.named_parameters()} | dict(model.named_buffers())


def export(trainer: RankTrainer, folder: Path, out: Path) -> None:
    tensors = trainer.gather_tensors()
    if dist.get_rank() == 0:
        export_tensors(tensors, trainer.model.config, folder / "tokenizer", out)
    assert not list(tensors)  # the other ranks send theirs and get none


def start(folder: Path, degrees: dict[str, int]) -> list[str]:
    """Names of the parts that differ from those of a model built whole, of drawn weights and of a model folder's.

    The model folders of both go to `folder`.
    """
    want = parts(make_trainer(folder / "whole", degrees).model)
    wrong: list[str] = []
    for name, values in (
        ("drawn", drawn_values(CONFIG, torch.Generator().manual_seed(SEED))),
        ("read", folder_values(folder / "start")),
    ):
        trainer = make_trainer(folder / name, degrees, values=values)
        found = parts(trainer.model)
        wrong += [f"{name} {part}" for part in want.keys() | found.keys() if not torch.equal(want[part], found[part])]
        export(trainer, folder, folder / f"{name}-ranks")
    return wrong


class _Started(Exception):
    """The model is there, the optimizer is not."""


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that live at once of those that torch allocates meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(folder: Path, degrees: dict[str, int], config: ModelConfig) -> tuple[int, int]:
    """Results of peak_bytes: until the model is sharded and filled, and of an export."""

    def make() -> RankTrainer:
        values = drawn_values(config, torch.Generator().manual_seed(SEED))
        return make_trainer(folder / "run", degrees, config, values)

    def begin() -> None:
        with patch.object(rank_loop, "ShardedMuonAdamW", side_effect=_Started), suppress(_Started):
            make()

    started, trainer = peak_bytes(begin), make()
    return started, peak_bytes(lambda: export(trainer, folder, folder / "ranks"))
