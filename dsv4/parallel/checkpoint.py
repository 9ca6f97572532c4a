"""Checkpoints that all ranks write together (torch.distributed.checkpoint), in the background of the next steps.

`folder/step-N` appears by a rename once every rank has written its part, so that a kill at any time leaves the last
whole one. A checkpoint holds tensors by name, whole or as parts: another number of ranks can read it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from dsv4.checkpoint.atomic import sync_folder

KEPT = 2  # checkpoints: the last one, and the one before
_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """Checkpoints of one run in `folder`, which all ranks see. Every method is called by all ranks together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Of its own: it writes while other collectives run.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pending: tuple[Future[Any], Path, Path, dict[str, Any]] | None = None

    def latest(self) -> Path | None:
        """The last whole checkpoint."""
        found = {int(m[1]): path for path in self.folder.glob("step-*") if (m := _NAME.fullmatch(path.name))}
        return found[max(found)] if found else None

    def start(self, step: int, tensors: Mapping[str, Tensor], position: dict[str, Any]) -> None:
        """Copy `tensors` and begin to write them; this rank's, of which no other rank has a whole one by that name."""
        self.finish()
        path = self.folder / f"step-{step}"
        temporary = self.folder / f"writing-{step}"
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier(self._group)
        future = async_save(dict(tensors), checkpoint_id=temporary, process_group=self._group)
        self._pending = cast("Future[Any]", future), temporary, path, position

    def finish(self) -> None:
        """Wait until the checkpoint begun last is whole, and remove those that are no longer kept."""
        if self._pending is None:
            return
        future, temporary, path, position = self._pending
        self._pending = None
        future.result()
        dist.barrier(self._group)
        if dist.get_rank() == 0:
            (temporary / "position.json").write_text(json.dumps(position), encoding="utf-8")
            sync_folder(temporary)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            sync_folder(self.folder)
            steps = sorted(int(m[1]) for p in self.folder.glob("step-*") if (m := _NAME.fullmatch(p.name)))
            for old in steps[:-KEPT]:
                shutil.rmtree(self.folder / f"step-{old}")
        dist.barrier(self._group)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read this rank's `tensors` from a checkpoint in place; its position. ValueError if it is damaged."""
        try:
            position = json.loads((path / "position.json").read_text(encoding="utf-8"))
            load(dict(tensors), checkpoint_id=path, process_group=self._group)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged or of another model ({error}); remove it to go on from another"
            ) from error
        return position
