"""Checkpoints that all ranks write together (torch.distributed.checkpoint), in the background of the next steps.

`folder/step-N` appears by a rename once every rank has written its part, so that a kill at any time leaves the last
whole one. `replaced-N` is being replaced, `gone-N` removed. A checkpoint holds tensors by name, whole or as parts:
another number of ranks can read it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from dsv4.checkpoint.atomic import space_in_words, sync_folder
from dsv4.parallel.first_rank import first_of_group, patient_group

KEPT = 2  # checkpoints: the last one, and the one before
SUSPECTED, COMMON = "suspected", "common.pt"  # files of a checkpoint
_NAME, _REPLACED = re.compile(r"step-(\d+)"), re.compile(r"replaced-(\d+)")


def whole_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    return sorted(int(m[1]) for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name)))


class _Writer(FileSystemWriter):
    """torch's writer, whose error for lack of space is a DiskFullError: its cause does not reach other ranks."""

    def write_data(self, *arguments: Any, **named: Any) -> Any:
        with space_in_words(_place(Path(self.path))):
            return super().write_data(*arguments, **named)

    def finish(self, *arguments: Any, **named: Any) -> None:
        with space_in_words(_place(Path(self.path))):
            super().finish(*arguments, **named)


def _place(temporary: Path) -> Path:
    """Path of a checkpoint that is being written, once it is whole."""
    return temporary.with_name(temporary.name.replace("writing", "step"))


@contextmanager
def _first_cause() -> Iterator[None]:
    """Raise the error of the first rank that has one in place of torch's, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from None


def read_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read this rank's `tensors` from a checkpoint in place; its position, and what is common.

    group: of the ranks that read together; None: one process alone. ValueError if the checkpoint is damaged.
    """
    try:
        position = json.loads((path / "position.json").read_text(encoding="utf-8"))
        with warnings.catch_warnings(), _first_cause():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as one process means it
            load(dict(tensors), checkpoint_id=path, process_group=group, no_dist=group is None)
        common = torch.load(path / COMMON, weights_only=True) if (path / COMMON).exists() else {}
    except (OSError, ValueError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError) as error:
        words = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged or of another model ({words}); remove it to go on from another") from error
    return position, common


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    position: dict[str, Any],
    common: Mapping[str, Any],
    suspected: bool,
) -> None:
    """Write a whole checkpoint from one process alone; arguments as of Checkpoints.start."""
    temporary = _new_folder(folder, step, suspected)
    try:
        with warnings.catch_warnings(), _first_cause():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(dict(tensors), storage_writer=_Writer(temporary), no_dist=True)
        _publish(folder, step, position, common)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints in a folder, the last one first, and the folder."""
    for step in reversed(whole_steps(folder)):
        _remove(folder / f"step-{step}")
    shutil.rmtree(folder, ignore_errors=True)


def restore_checkpoints(folder: Path) -> None:
    """Undo a replacement that a kill cut short, and remove what killed runs left of others and of removals."""
    found = (m for path in folder.glob("replaced-*") if (m := _REPLACED.fullmatch(path.name)))
    for step in sorted((int(m[1]) for m in found), reverse=True):
        replaced = folder / f"replaced-{step}"
        if step > max(whole_steps(folder), default=-1):
            replaced.rename(folder / f"step-{step}")
            sync_folder(folder)
        else:
            _remove(replaced)
    for left in folder.glob("gone-*"):
        shutil.rmtree(left, ignore_errors=True)


def _new_folder(folder: Path, step: int, suspected: bool) -> Path:
    """Folder to write a checkpoint to, the only one: what a killed run left goes."""
    temporary = folder / f"writing-{step}"
    for left in folder.glob("writing-*"):
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    if suspected:
        (temporary / SUSPECTED).touch()
    return temporary


def _publish(folder: Path, step: int, position: dict[str, Any], common: Mapping[str, Any]) -> None:
    """Rename a checkpoint whose tensors are written."""
    path, temporary = folder / f"step-{step}", folder / f"writing-{step}"
    with space_in_words(path):
        with (temporary / "position.json").open("wb") as handle:
            handle.write(json.dumps(position).encode())
            _sync(handle)
        if common:
            with (temporary / COMMON).open("wb") as handle:
                torch.save(dict(common), handle)  # given a path, its error would not say why writing failed
                _sync(handle)
        sync_folder(temporary)
    replaced = folder / f"replaced-{step}"
    if path.exists():  # of before a rollback
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    sync_folder(folder)
    if replaced.exists():
        _remove(replaced)


def _sync(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    """Remove a checkpoint, first by another name: one that is removed in part counts no more."""
    gone = path.with_name(f"gone-{path.name.partition('-')[2]}")
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(path.rename(gone))


class Checkpoints:
    """Checkpoints of one run in `folder`, which all ranks see. Every method is called by all ranks together."""

    def __init__(self, folder: Path, kept: int = 0) -> None:
        """kept: checkpoints without a suspicion that stay besides the last ones."""
        self.folder, self._kept = folder, kept
        # Of its own: it writes while other collectives run.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pending: tuple[Future[Any], int, dict[str, Any], dict[str, Any]] | None = None
        first_of_group(lambda: restore_checkpoints(folder), patient_group())  # a shared disk may be slow

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return whole_steps(self.folder)

    def unsuspected(self) -> list[int]:
        """Steps of the last `kept` checkpoints without a suspicion, ascending."""
        found = [step for step in self.steps() if not (self.path(step) / SUSPECTED).exists()]
        return found[-self._kept :] if self._kept else []

    def latest(self) -> Path | None:
        """The last whole checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def start(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        position: dict[str, Any],
        common: Mapping[str, Any] | None = None,
        suspected: bool = False,
    ) -> None:
        """Copy `tensors` and begin to write them; this rank's, of which no other rank has a whole one by that name.

        position: numbers and texts, as JSON; common: the same on all ranks, tensors too; suspected: none to keep.
        """
        self.finish()
        temporary = self.folder / f"writing-{step}"
        first_of_group(lambda: _new_folder(self.folder, step, suspected), self._group)
        future = async_save(dict(tensors), storage_writer=_Writer(temporary), process_group=self._group)
        self._pending = cast("Future[Any]", future), step, position, dict(common or {})

    @property
    def writing(self) -> bool:
        """True while this rank, which may be ahead of others, writes."""
        return self._pending is not None and not self._pending[0].done()

    def finish(self) -> None:
        """Wait until the checkpoint begun last is whole, and remove those that are no longer kept.

        If it could not be written, the error is raised on all ranks; what there is of it goes, and the rest stays.
        """
        if self._pending is None:
            return
        future, step, position, common = self._pending
        self._pending = None

        def publish() -> None:
            _publish(self.folder, step, position, common)
            for other in set(self.steps()[:-KEPT]) - set(self.unsuspected()):
                _remove(self.path(other))

        try:
            with _first_cause():
                future.result()  # fails on all ranks if on one
            first_of_group(publish, self._group)
        except Exception:
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder / f"writing-{step}", ignore_errors=True)
            raise

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, the last one first."""
        self.finish()
        dist.barrier(self._group)  # all ranks have read what they need of them
        if dist.get_rank() == 0:
            for later in reversed(self.steps()):
                if later > step:
                    _remove(self.path(later))
        dist.barrier(self._group)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As read_checkpoint."""
        return read_checkpoint(path, tensors, self._group)
