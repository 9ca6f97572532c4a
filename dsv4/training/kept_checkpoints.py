"""Checkpoints of all ranks that a run may roll back to: the last few that were not written within a spike."""

from __future__ import annotations

from pathlib import Path

from dsv4.parallel.checkpoint import Checkpoints


class KeptCheckpoints:
    """With the interface of KeptStates: the last `count` checkpoints without a suspicion, which `Checkpoints` keeps."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return self._checkpoints.unsuspected()

    def path(self, step: int) -> Path:
        return self._checkpoints.path(step)

    def keep(self, state: Path, step: int) -> None:
        """Nothing: the checkpoint says itself if it may be kept."""

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run has left the way that led to them."""
        self._checkpoints.drop_after(step)
