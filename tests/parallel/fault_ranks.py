"""Faults of test_rank_faults.py on one rank."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from dsv4.analysis.degrees import Degrees
from dsv4.data.shards import ShardError
from dsv4.parallel import checkpoint
from dsv4.parallel.fsdp import local_part
from dsv4.parallel.sums import gather_objects
from dsv4.training.loop import Stage
from dsv4.training.plan import FixedPlan
from dsv4.training.rank_loop import RankTrainer
from tests.parallel.rank_program import UnevenBatches, make_start, settings
from tests.training.tiny_training import Rows

End = tuple[str, list[int]]  # words of the error, and the steps of the whole checkpoints
STEPS = 5


@dataclass
class Source(UnevenBatches):
    """Batches that `change`, of rows, spoils from a step on."""

    change: Callable[[Rows], Rows] = field(default=lambda rows: rows)

    def batch(self, step: int, /) -> Rows:
        return self.change(super().batch(step))


def make_trainer(folder: Path, source: Source) -> RankTrainer:
    model, optimizer = make_start(None)
    degrees = Degrees(data=dist.get_world_size())
    stages = [Stage("only", 1.0, source)]
    return RankTrainer(model, optimizer, stages, settings(), FixedPlan(STEPS), folder, degrees, quiet=True)


def on_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def spoil_gradient(trainer: RankTrainer, source: Source) -> None:
    optimizer: Any = trainer.optimizer
    collect = optimizer.collect

    def collect_and_spoil() -> None:
        collect()
        if on_last_rank():
            gradients = [p.grad for p in optimizer._inner.parameters.values() if p.grad is not None]
            gradients[0].view(-1)[0] = float("nan")

    optimizer.collect = collect_and_spoil


def spoil_loss(trainer: RankTrainer, source: Source) -> None:
    if on_last_rank():
        local_part(trainer.model.head.weight).view(-1)[0] = float("nan")


def drop_targets(trainer: RankTrainer, source: Source) -> None:
    source.change = lambda rows: Rows(rows.documents, [[0] * len(document) for document in rows.documents])


def drop_targets_while_writing(trainer: RankTrainer, source: Source) -> None:
    """From step 4 on, as whose checkpoint is not whole yet."""
    batch, none = source.batch, Source()
    drop_targets(trainer, none)
    source.batch = lambda step: (none.batch if step >= 4 * dist.get_world_size() else batch)(step)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.checkpoints.__class__ = _Writing


class _Writing(checkpoint.Checkpoints):
    """Checkpoints that take as long as the step after them."""

    writing = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def damage_shards(trainer: RankTrainer, source: Source) -> None:
    def damaged(rows: Rows) -> Rows:
        raise ShardError("shards/shard-00017.arrow is damaged")

    source.change = damaged


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(trainer: RankTrainer, source: Source) -> None:
    if on_last_rank():
        FileSystem.create_stream = no_space  # pyright: ignore[reportAttributeAccessIssue]


def fill_disk_at_the_end(trainer: RankTrainer, source: Source) -> None:
    checkpoint.sync_folder = no_space


FAULTS: dict[str, Callable[[RankTrainer, Source], None]] = {
    "gradient": spoil_gradient,
    "loss": spoil_loss,
    "no target": drop_targets,
    "no target while writing": drop_targets_while_writing,
    "shard": damage_shards,
    "full disk": fill_disk,
    "full disk at the end": fill_disk_at_the_end,
}


def end_of(work: Callable[[], object], folder: Path) -> End:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}", checkpoint.whole_steps(folder / "checkpoints")
    raise AssertionError("no error")


def run_faults(folder: Path) -> dict[str, list[End]]:
    """By name of the fault, the end of every rank."""
    torch.set_num_threads(1)
    create, sync = FileSystem.create_stream, checkpoint.sync_folder
    found: dict[str, list[End]] = {}
    for name, make in FAULTS.items():
        source = Source()
        trainer = make_trainer(folder / name, source)
        trainer.run(2)
        make(trainer, source)
        found[name] = gather_objects(end_of(trainer.run, folder / name))
        FileSystem.create_stream, checkpoint.sync_folder = create, sync
    last = folder / "full disk"
    make_trainer(last, Source()).run()
    for path in (last / "checkpoints" / f"step-{STEPS}").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    dist.barrier()
    found["damaged"] = gather_objects(end_of(lambda: make_trainer(last, Source()), last))
    return found
