"""View of the compression windows that a ragged batch closes, and of the open windows' state. Plain tensors only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.kernels.attention.views import Ragged


@dataclass(frozen=True)
class Windows:
    """Windows of `ratio` tokens. With overlap an entry covers twice as many, the previous window's first."""

    ratio: int
    batch: Ragged
    positions: Tensor  # int64 [T]
    source: Tensor  # int64 [windows, slots]: row of [state rows of the batch's sequences | new tokens | one pad row]
    state_kv: Tensor | None  # fp32 [cache rows, slots, total]: position p in row p % slots; None: no earlier tokens
    state_score: Tensor | None  # ape included
    state_slots: Tensor  # int64 [n], cache rows of the sequences with a state
    state_row: Tensor  # int64 [m]: state rows (cache row * slots + slot) to write
    state_token: Tensor  # int64 [m]: token written to each of them
    writes_state: bool = True  # False: the state was received, with a gradient, and no later batch reads it

    @property
    def slots(self) -> int:
        return self.source.shape[1]

    @property
    def overlap(self) -> bool:
        return self.slots > self.ratio
