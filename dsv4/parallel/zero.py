"""Hybrid ZeRO for Muon (DeepSeek-V4 report): a dense matrix is stepped as a whole by one rank, its owner.

FSDP cuts matrices into rows, Newton-Schulz needs whole ones. So the parts of a gradient go to the owner, and the new
weight's parts come back, all matrices in one exchange. Experts are cut between matrices: their ranks step them where
they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def newton_schulz_cost(shapes: Iterable[tuple[int, int]]) -> int:
    """Products per iteration for matrices of these shapes: the Gram matrix, its square, and its product with X."""
    sides = ((min(shape), max(shape)) for shape in shapes)
    return sum(2 * short * short * long + short**3 for short, long in sides)


def assign_owners(costs: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Rank of each matrix: costliest first, each to the rank with the least so far."""
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


@dataclass(frozen=True)
class Matrix:
    """A parameter [rows, columns], of whose rows every rank has an equal part (the last ones less), and its owner."""

    name: str
    rows: int
    columns: int
    owner: int

    def part(self, rank: int, ranks: int) -> tuple[int, int]:
        """First row and number of rows that `rank` has."""
        each = -(-self.rows // ranks)
        first = min(self.rows, rank * each)
        return first, min(each, self.rows - first)


class WholeMatrices:
    """Exchange between the ranks' parts of `matrices`, in the same order on every rank, and their owners."""

    def __init__(self, matrices: Sequence[Matrix], group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.matrices = matrices
        self.owned = [matrix for matrix in matrices if matrix.owner == self.rank]
        self._by_owner = [[m for m in matrices if m.owner == rank] for rank in range(self.ranks)]

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Elements of this rank's parts by owner, and of every rank's parts of the owned matrices."""
        mine = [sum(m.part(self.rank, self.ranks)[1] * m.columns for m in owned) for owned in self._by_owner]
        theirs = [sum(m.part(r, self.ranks)[1] * m.columns for m in self.owned) for r in range(self.ranks)]
        return mine, theirs

    def to_owners(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole float32 tensors of the owned matrices, from every rank's `parts` [its rows, columns] of all."""
        mine, theirs = self._sizes()
        flat = [parts[m.name].float().flatten() for owned in self._by_owner for m in owned]
        received = flat[0].new_empty(sum(theirs))
        dist.all_to_all_single(received, torch.cat(flat), theirs, mine, group=self.group)
        whole = {m.name: received.new_empty(m.rows, m.columns) for m in self.owned}
        for rank, chunk in enumerate(received.split(theirs)):
            pieces = chunk.split([m.part(rank, self.ranks)[1] * m.columns for m in self.owned]) if self.owned else ()
            for matrix, piece in zip(self.owned, pieces, strict=True):
                first, rows = matrix.part(rank, self.ranks)
                whole[matrix.name][first : first + rows] = piece.view(rows, matrix.columns)
        return whole

    def from_owners(self, whole: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Write the owners' `whole` matrices into every rank's `parts`."""
        mine, theirs = self._sizes()
        flat = [
            whole[m.name][first : first + rows].flatten()
            for rank in range(self.ranks)
            for m in self.owned
            for first, rows in [m.part(rank, self.ranks)]
        ]
        some = next(iter(parts.values()))
        received = some.new_empty(sum(mine), dtype=torch.float32)
        sent = torch.cat(flat) if flat else received.new_empty(0)
        dist.all_to_all_single(received, sent, mine, theirs, group=self.group)
        ordered = [m for owned in self._by_owner for m in owned]
        pieces = received.split([m.part(self.rank, self.ranks)[1] * m.columns for m in ordered])
        for matrix, piece in zip(ordered, pieces, strict=True):
            parts[matrix.name].copy_(piece.view_as(parts[matrix.name]))
