"""Trajectories: episodes as samples, whose metadata is in memory and whose arrays are on disk until they are used."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.model.choices import Choices
from dsv4.post_training.problems import Explained
from dsv4.post_training.rollouts import DrawnBy


@dataclass(frozen=True)
class Trajectory:
    """One episode as one sample: its tokens, of which those in `spans` were sampled, and their log-probabilities.

    Log-probabilities, sampling masks and choices are as of a Rollout. Arrays are read from `file` each time; after
    `release` they are gone, and the rest remains.
    """

    prompt: int  # number of its goal, which its group shares
    spans: tuple[tuple[int, int], ...]  # of the document, start and stop
    num_document: int
    text: str  # of the last turn
    finished: bool  # False: ended by a limit
    turns: int
    calls: int
    outcome: Explained | None  # None if it is not finished, or its environment was lost
    error: str | None
    file: Path
    drawn_by: DrawnBy = ()
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def places(self) -> list[int]:
        return [place for start, stop in self.spans for place in range(start, stop)]

    @property
    def document(self) -> list[int]:
        return self._array("document").tolist()

    @property
    def token_ids(self) -> list[int]:
        return self._array("document")[self.places].tolist()

    @property
    def log_probabilities(self) -> list[float]:
        return self._array("log_probabilities").tolist()

    @property
    def sampling_masks(self) -> tuple[bytes, ...]:
        masks = self._read("masks")
        return () if masks is None else tuple(mask.tobytes() for mask in masks)

    @property
    def choices(self) -> Choices | None:
        experts, entries = self._read("experts"), self._read("entries")
        return None if experts is None and entries is None else Choices(experts, entries)

    def release(self) -> None:
        """Remove the arrays; again is allowed."""
        self.file.unlink(missing_ok=True)

    def _array(self, name: str) -> np.ndarray:
        with np.load(self.file) as arrays:
            return arrays[name]

    def _read(self, name: str) -> np.ndarray | None:
        """An array that not every trajectory has."""
        with np.load(self.file) as arrays:
            return arrays.get(name)


class TrajectoryFiles:
    """Folder of trajectories' arrays; what an earlier process left in it is removed."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self._numbers = folder, count()

    def write(
        self,
        document: Sequence[int],
        log_probabilities: array[float],
        masks: Sequence[bytes] = (),
        choices: Choices | None = None,
    ) -> Path:
        """Write the arrays of one trajectory to a new file; any number of threads may."""
        arrays: dict[str, Any] = {
            "document": np.asarray(document, dtype=np.int32),
            "log_probabilities": np.asarray(log_probabilities, dtype=np.float32),
            "masks": np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1) if masks else None,
            "experts": None if choices is None else choices.experts,
            "entries": None if choices is None else choices.entries,
        }
        path = self.folder / f"{next(self._numbers)}.npz"
        np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
        return path
