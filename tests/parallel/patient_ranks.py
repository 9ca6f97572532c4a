"""Begin and end of runs of test_first_rank.py on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from dsv4.analysis.degrees import Degrees
from dsv4.checkpoint.errors import CheckpointError
from dsv4.training import rank_loop, run_export
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from tests.parallel.rank_program import STEPS, make_stages, make_start, settings

TIMEOUT = 15.0  # seconds that a collective waits


def begin(folder: Path, lora: str | None) -> RankTrainer:
    model, optimizer = make_start(lora)
    return RankTrainer(
        model, optimizer, make_stages(["sparse"]), settings(), FixedPlan(STEPS), folder, Degrees(data=2), quiet=True
    )


def begin_and_export(folder: Path) -> bool:
    """True if the model folder exists after a run whose first rank works longer than a collective waits, twice."""
    dist.barrier()  # imports take long on a busy machine
    _set_pg_timeout(timedelta(seconds=TIMEOUT))

    def take_state(*_: object) -> None:
        time.sleep(1.3 * TIMEOUT)

    def export_adapter(pairs: object, lora: object, start: Path, adapter: Path, out: Path) -> None:
        time.sleep(1.3 * TIMEOUT)
        out.mkdir()

    with patch.object(rank_loop, "take_state", take_state), patch.object(run_export, "export_adapter", export_adapter):
        trainer = begin(folder, "adamw_no_decay")
        run_export.export_run(trainer, LoraSettings(3), Path("nano"), folder, folder / "model")
    dist.barrier()
    return (folder / "model").is_dir()


def fail_to_export(folder: Path) -> tuple[str, str]:
    """Kind and words of this rank's error where the first one cannot write what all send, and its error no pickle."""

    def export_tensors(tensors: Iterator[tuple[str, Tensor]], *_: object) -> None:
        raise CheckpointError("model", "room", "none", next(tensors)[0])

    trainer = begin(folder, None)
    try:
        with patch.object(run_export, "export_tensors", export_tensors):
            run_export.export_run(trainer, None, None, folder, folder / "model")
    except ValueError as error:
        return type(error).__name__, str(error)
    raise AssertionError("no error")
