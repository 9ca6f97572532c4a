"""Continuous batching: which sequences compute how many tokens in the next step.

A sequence has no prefill phase and no decode phase: it has tokens that the cache does not hold yet. One that has many
is computed in chunks, one that has a single new token decodes, and a step mixes both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dsv4.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. Every running sequence must be able to decode in a step, so tokens >= sequences."""

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {self.max_num_seqs}; allowed: 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs"
                f" ({self.max_num_seqs}), so that every running sequence can decode in one step"
            )


@dataclass(frozen=True)
class ScheduledChunk:
    """The next tokens of one sequence: positions start to stop. `samples` when they reach its last token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == self.sequence.num_tokens


class Scheduler:
    """First come, first served. Owns which cache row (slot) a running sequence lives in."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's chunks: decoding sequences first, then unfinished prompts, then admissions, oldest first."""
        budget = self.config.max_num_batched_tokens
        chunks: list[ScheduledChunk] = []
        # A long prompt must not delay those that decode; the sort is stable, so age decides among equals.
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed_tokens > 1):
            budget -= self._take(sequence, budget, chunks)
        while self.waiting and budget > 0 and self._free_slots:
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            budget -= self._take(sequence, budget, chunks)
        return chunks

    def finish(self, sequence: Sequence) -> int | None:
        """Takes a sequence out. Returns the cache row that is free again, None when it had none."""
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        slot = sequence.slot
        sequence.status, sequence.slot = SequenceStatus.FINISHED, -1
        if slot < 0:
            return None
        self._free_slots.append(slot)
        return slot

    @staticmethod
    def _take(sequence: Sequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        count = min(sequence.num_uncomputed_tokens, budget)
        if count:
            start = sequence.num_computed_tokens
            chunks.append(ScheduledChunk(sequence, start, start + count))
        return count
