"""Groups of rows made ahead of their use, by processes of torch's DataLoader.

A group is a function of its number, so how many processes make them, or none, changes no batch. torchdata's
StatefulDataLoader keeps the state of iterators; here the state is one number, and the run's position already has it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import count
from multiprocessing import current_process
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, Sampler


class GroupSource(Protocol):
    """Something with numbered groups; pickled to the processes that make them."""

    def group(self, number: int, /) -> Any: ...


class Prefetch:
    """Groups of `source` in any order; those at equal distances, ascending, are made ahead by `workers` processes.

    The distance is above 1 where a step has more rows than a group, and other ranks take theirs. Without workers, and
    in a process that may have no children, a group is made when it is asked for.
    """

    def __init__(self, source: GroupSource, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"{workers} workers; allowed: 0 or more")
        self._source = source
        self._workers = 0 if current_process().daemon else workers
        self._number, self._group = -1, None
        self._ahead: Iterator[Any] | None = None
        self._distance = 1  # between the groups that are made ahead

    def group(self, number: int) -> Any:
        """Return a group. The last one is kept."""
        if number != self._number:
            if not self._workers:
                self._group = self._source.group(number)
            else:
                if self._ahead is None or number != self._number + self._distance:
                    self._distance = max(1, number - self._number) if self._number >= 0 else 1
                    self._ahead = self._start(number, self._distance)
                self._group = next(self._ahead)
            self._number = number
        return self._group

    def close(self) -> None:
        """End the processes."""
        self._ahead, self._number, self._group = None, -1, None

    def _start(self, number: int, distance: int) -> Iterator[Any]:
        loader = DataLoader(
            _Groups(self._source),
            batch_size=None,
            sampler=_From(number, distance),
            num_workers=self._workers,
            collate_fn=_unchanged,
            worker_init_fn=_leave_group,
            prefetch_factor=1,
            # Forking a process that runs torch's threads can hang.
            multiprocessing_context="spawn",
        )
        return iter(loader)


def _leave_group(worker: int) -> None:
    """Leave the main process's group, to which terminals, torchrun and timeout send signals; it says when this ends."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Groups(Dataset[Any]):
    def __init__(self, source: GroupSource) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Any:
        return self._source.group(number)


class _From(Sampler[int]):
    """Every `distance`-th number from `start` on, without end."""

    def __init__(self, start: int, distance: int) -> None:
        self._start, self._distance = start, distance

    def __iter__(self) -> Iterator[int]:
        return count(self._start, self._distance)


def _unchanged(group: Any) -> Any:
    return group
