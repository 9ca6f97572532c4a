"""RaggedBatch: the model's only input type, tokens of N sequences laid end to end, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


class Part(Protocol):
    """A batch's place in a larger one that is cut over processes, and the exchange with those before and after it.

    Only the first sequence may go on from another process. All processes call the same methods in the same order; their
    gradients flow back to the process that a row came from.
    """

    @property
    def ahead(self) -> Tensor:
        """int64 [at most 2]: ids of the tokens that follow in the last sequence, which other processes hold."""
        ...

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each sequence's document in all processes together."""
        ...

    def earlier(self, count: int, *rows: Tensor) -> tuple[Tensor, ...]:
        """Of each rows [T, width], those [1, count, width] of the first sequence's last `count` - 1 earlier tokens.

        Position p lies in row p % count; places without a token are zeros.
        """
        ...

    def earlier_entries(self, made: Tensor, ratio: int) -> Tensor:
        """Entries [start // ratio, width] of the first sequence that other processes made; made [n, width] here."""
        ...

    def add_documents(self, rows: Tensor) -> Tensor:
        """rows [N, ...] of the sequences, added up over the processes that hold their documents; without gradient."""
        ...

    def tie(self, x: Tensor, *others: Tensor) -> Tensor:
        """x, with a gradient for `others` too (zeros), so that every process runs the backward of every exchange."""
        ...


@dataclass(frozen=True)
class RaggedBatch:
    """Tokens of N sequences. Sequence i is token_ids[cu_seqlens[i]:cu_seqlens[i + 1]], from position starts[i] on."""

    token_ids: Tensor  # int64 [T]
    lengths: np.ndarray  # int64 [N], new tokens of each sequence, each >= 1
    starts: np.ndarray  # int64 [N], position of each sequence's first new token
    slots: np.ndarray  # int64 [N], cache row of each sequence
    part: Part | None = None  # None: no other process holds tokens of these sequences

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """int64 [N + 1]: offset of each sequence in the batch, then T."""
        return torch.from_numpy(np.concatenate(([0], np.cumsum(self.lengths))))

    @property
    def positions(self) -> Tensor:
        """int64 [T]: position of each token in its own sequence."""
        return torch.from_numpy(token_positions(self.lengths, self.starts)[1])

    @staticmethod
    def pack(
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> RaggedBatch:
        """Lay token lists end to end. starts default to 0, slots to 0..N-1. ValueError on an empty list of tokens."""
        lengths = [len(s) for s in sequences]
        if not lengths or min(lengths) == 0:
            raise ValueError("a ragged batch needs at least one sequence, and every sequence at least one token")
        token_ids = torch.from_numpy(np.fromiter(chain.from_iterable(sequences), np.int64))
        return RaggedBatch(
            token_ids=token_ids if device in ("cpu", CPU) else token_ids.to(device),
            lengths=np.array(lengths, dtype=np.int64),
            starts=np.zeros(len(lengths), np.int64) if starts is None else np.array(starts, dtype=np.int64),
            slots=np.arange(len(lengths)) if slots is None else np.array(slots, dtype=np.int64),
        )


def token_positions(lengths: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sequence of each token [T], position of each token [T]) of a ragged batch."""
    seq = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    return seq, np.arange(len(seq)) - first[seq] + starts[seq]
