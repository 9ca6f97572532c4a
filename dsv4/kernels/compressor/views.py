"""View of the windows of tokens that a ragged batch closes, and of the state of open ones. Plain tensors only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.kernels.attention.views import Ragged


@dataclass(frozen=True)
class Windows:
    """Windows of `ratio` tokens. With overlap an entry is made of twice as many, those of the window before first."""

    ratio: int
    batch: Ragged
    positions: Tensor  # int64 [T]
    source: Tensor  # int64 [windows, slots]: of [state rows of the batch's sequences | new tokens | one pad row]
    state_kv: Tensor | None  # fp32 [cache rows, slots, total]: position p in row p % slots; None: there is no cache
    state_score: Tensor | None  # ape included
    state_slots: Tensor  # int64 [N], the batch's cache rows
    state_row: Tensor  # int64 [m]: state rows (cache row * slots + slot) to write, with
    state_token: Tensor  # int64 [m]: the tokens that they come from

    @property
    def slots(self) -> int:
        return self.source.shape[1]

    @property
    def overlap(self) -> bool:
        return self.slots > self.ratio
