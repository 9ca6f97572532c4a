"""Tokens of a ragged batch by sequence and position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4.model.batch import RaggedBatch, token_positions


@dataclass(frozen=True)
class Tokens:
    """Index tables of a batch of N sequences and T tokens, int64."""

    slots: np.ndarray  # [N]: cache row of each sequence
    starts: np.ndarray  # [N]: position of each sequence's first new token
    ends: np.ndarray  # [N]: position after its last token
    first: np.ndarray  # [N]: index of its first token in the batch
    sequence: np.ndarray  # [T]: sequence of each token
    position: np.ndarray  # [T]: position of each token in its sequence

    @staticmethod
    def of(batch: RaggedBatch) -> Tokens:
        sequence, position = token_positions(batch.lengths, batch.starts)
        first = np.cumsum(batch.lengths) - batch.lengths
        return Tokens(batch.slots, batch.starts, batch.starts + batch.lengths, first, sequence, position)

    @property
    def count(self) -> int:
        return len(self.sequence)

    @property
    def num_sequences(self) -> int:
        return len(self.starts)

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `count` tokens of each sequence and their rows in rings of `count` rows per cache row.

        Returns (rows slot * count + position mod count [k], tokens [k]).
        """
        token = np.nonzero(self.position >= (self.ends - count)[self.sequence])[0]
        slot = self.slots[self.sequence[token]]
        return slot * count + self.position[token] % count, token
