"""Continuous batching: which sequences compute how many tokens in the next step.

A sequence has no prefill phase and no decode phase: it has tokens that the cache does not hold yet. One that has many
is computed in chunks, one that has a single new token decodes, and a step mixes both.

How a step is shared: every sequence that decodes gets its token. Half of what is left is the oldest unread prompt's, so
that no stream of others can starve it. The other half goes to prompts of at most half as many tokens as that one still
has, the shortest first: so much shorter, a prompt gains more time by overtaking than it costs the oldest. What is then
left goes by age. Only `max_num_partial_prefills` cache rows hold half-read prompts, so that a short prompt finds a row
and its first token comes within a few steps, whatever is being read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from dsv4.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step. Every running sequence must be able to decode in a step, so tokens >= sequences.

    `max_num_partial_prefills`: sequences whose prompts are read in part at a time; None: half of max_num_seqs.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024
    max_num_partial_prefills: int | None = None

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs is {self.max_num_seqs}; allowed: 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs"
                f" ({self.max_num_seqs}), so that every running sequence can decode in one step"
            )
        if not 1 <= self.partial_prefills <= self.max_num_seqs:
            raise ValueError(
                f"max_num_partial_prefills is {self.max_num_partial_prefills}; allowed: [1, {self.max_num_seqs}]"
                " (max_num_seqs)"
            )

    @property
    def partial_prefills(self) -> int:
        """Rows that may hold half-read prompts."""
        if self.max_num_partial_prefills is None:
            return max(1, self.max_num_seqs // 2)
        return self.max_num_partial_prefills


@dataclass(frozen=True)
class ScheduledChunk:
    """The next tokens of one sequence: positions start to stop. `samples` when they reach its last token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == self.sequence.num_tokens


def reading_order(unread: SequenceOf[int], budget: int) -> Iterator[tuple[int, int]]:
    """Which prompts a step reads: pairs (place, tokens at most), to be served in turn until the budget is spent.

    `unread`: tokens that each prompt still has, the oldest prompt first.
    """
    yield 0, budget - budget // 2
    overtaking = [place for place, count in enumerate(unread) if place and 2 * count <= unread[0]]
    for place in sorted(overtaking, key=lambda place: unread[place]):  # stable: age decides among equals
        yield place, unread[place]
    yield from enumerate(unread)


class Scheduler:
    """Shares out steps as the module says. Owns which cache row (slot) a running sequence lives in."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._unfinished: dict[Sequence, None] = {}  # waiting and running, in the order of their coming
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        self.waiting.append(sequence)
        self._unfinished[sequence] = None

    def schedule(self) -> list[ScheduledChunk]:
        """The next step's chunks: the sequences that decode, then prompts, some of which begin to run."""
        counts = {sequence: 1 for sequence in self.running if sequence.num_uncomputed_tokens == 1}
        counts |= self._read(self.config.max_num_batched_tokens - len(counts))
        chunks: list[ScheduledChunk] = []
        for sequence, count in counts.items():
            start = sequence.num_computed_tokens
            chunks.append(ScheduledChunk(sequence, start, start + count))
        return chunks

    def _read(self, budget: int) -> dict[Sequence, int]:
        """How many tokens of which prompts are read, `budget` in all. Those that begin have a row afterwards."""
        waiting = SequenceStatus.WAITING
        prompts = [s for s in self._unfinished if s.status is waiting or s.num_uncomputed_tokens > 1]
        counts: dict[Sequence, int] = {}
        for place, most in reading_order([s.num_uncomputed_tokens for s in prompts], budget) if prompts else ():
            sequence = prompts[place]
            count = min(most, budget, sequence.num_uncomputed_tokens - counts.get(sequence, 0))
            if not count:
                continue
            if sequence.status is waiting:
                if not self._may_begin(sequence, count, prompts[0], counts):
                    continue
                self._begin(sequence)
            counts[sequence] = counts.get(sequence, 0) + count
            budget -= count
        return counts

    def _may_begin(self, sequence: Sequence, count: int, oldest: Sequence, counts: dict[Sequence, int]) -> bool:
        """Whether a waiting sequence gets a row for its first `count` tokens. One that is read whole needs no more."""
        if not self._free_slots:
            return False
        if sequence is oldest or count == sequence.num_uncomputed_tokens:
            return True
        half_read = [s for s in {oldest, *self.running} if s.num_uncomputed_tokens - counts.get(s, 0) > 1]
        return len(half_read) < self.config.partial_prefills

    def _begin(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def finish(self, sequence: Sequence) -> int | None:
        """Takes a sequence out. Returns the cache row that is free again, None when it had none."""
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        self._unfinished.pop(sequence, None)
        slot = sequence.slot
        sequence.status, sequence.slot = SequenceStatus.FINISHED, -1
        if slot < 0:
            return None
        self._free_slots.append(slot)
        return slot
