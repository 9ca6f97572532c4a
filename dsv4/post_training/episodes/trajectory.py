"""Trajectories: episodes as samples, whose metadata is in memory and whose arrays are on disk until they are used."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from dsv4.model.choices import Choices
from dsv4.post_training.episodes.streams import EpisodeStreams
from dsv4.post_training.problems import Explained
from dsv4.post_training.rollouts import DrawnBy


@dataclass(frozen=True)
class Trajectory:
    """One episode as one sample: its tokens, of which those in `spans` were sampled, and their log-probabilities.

    Log-probabilities, sampling masks and choices are as of a Rollout. Arrays are read from `streams` each time; after
    `release` they are gone, and the rest remains.
    """

    prompt: int  # number of its goal, which its group shares
    num_document: int
    text: str  # of the last turn
    finished: bool  # False: ended by a limit
    calls: int
    outcome: Explained | None  # None if it is not finished, or its environment was lost
    error: str | None
    streams: EpisodeStreams
    drawn_by: DrawnBy = ()
    temperature: float = 1.0

    @property
    def turns(self) -> int:
        return self.streams.lengths["spans"]

    @property
    def num_tokens(self) -> int:
        return self.streams.lengths["log_probabilities"]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and stop in the document of what each turn has sampled."""
        return [(start, stop) for start, stop in self.streams.read("spans").tolist()]

    @property
    def places(self) -> list[int]:
        return [place for start, stop in self.spans for place in range(start, stop)]

    @property
    def document(self) -> list[int]:
        return self.streams.read("document")[: self.num_document].tolist()

    @property
    def token_ids(self) -> list[int]:
        return self.streams.read("document")[self.places].tolist()

    @property
    def log_probabilities(self) -> list[float]:
        return self.streams.read("log_probabilities").tolist()

    @property
    def sampling_masks(self) -> tuple[bytes, ...]:
        return tuple(mask.tobytes() for mask in self.streams.read("masks"))

    @property
    def choices(self) -> Choices | None:
        experts, entries = (
            self.streams.read(name) if self.streams.lengths[name] else None for name in ("experts", "entries")
        )
        return None if experts is None and entries is None else Choices(experts, entries)

    def release(self) -> None:
        """Remove the arrays; again is allowed."""
        self.streams.release()


class TrajectoryFiles:
    """Folder of trajectories' arrays; what an earlier process left in it is removed."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self._numbers = folder, count()

    def new(self) -> EpisodeStreams:
        """Streams of one trajectory; any number of threads may ask for some."""
        return EpisodeStreams(self.folder / str(next(self._numbers)))
