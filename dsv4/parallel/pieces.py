"""Pieces of a sharded model's tensors by official name: filled on each rank, and put together on the first.

Both go one tensor at a time, so that no process holds the whole model: a rank has its pieces and one whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dsv4.analysis.inventory import tensor_inventory
from dsv4.model.parameters import matrix_name
from dsv4.model.stacks import named_tensors
from dsv4.model.transformer import Transformer
from dsv4.parallel.fsdp import first_row, local_part
from dsv4.parallel.sums import gather_objects

# Whole tensors by official name, one at a time, of the names asked for.
Values = Callable[[Container[str]], Iterator[tuple[str, Tensor]]]


class Piece(NamedTuple):
    """Adjacent rows of a tensor, not copied, and the number of the first."""

    rows: Tensor
    first: int


def own_pieces(model: Transformer, mesh: DeviceMesh) -> dict[str, Piece]:
    """Share of this rank in a model's parameters and tables; of routed experts, whole matrices."""
    pieces: dict[str, Piece] = {}
    for name, tensor in named_tensors(model).items():
        part, first = local_part(tensor), first_row(tensor)
        if ".experts." in name:
            first += mesh.get_local_rank("expert") * tensor.shape[0]
            pieces |= {matrix_name(name, number): Piece(matrix, 0) for number, matrix in enumerate(part, first)}
        else:
            pieces[name] = Piece(part, first)
    return pieces


def fill_pieces(model: Transformer, mesh: DeviceMesh, values: Values) -> None:
    """Copy this rank's rows of `values` into its pieces; a value that comes again replaces the first."""
    pieces = own_pieces(model, mesh)
    missing = set(pieces)
    for name, value in values(pieces.keys()):
        rows, first = pieces[name]
        rows.copy_(value[first : first + len(rows)])
        missing.discard(name)
    if missing:
        raise RuntimeError(f"no values for {', '.join(sorted(missing))}")


class _Held(NamedTuple):
    """A rank's piece, as other ranks know it."""

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def gather_tensors(model: Transformer, mesh: DeviceMesh) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters and tables of a model, by official name in the checkpoint's order, on rank 0's CPU.

    All ranks iterate together; the others send their pieces and get none.
    """
    pieces, rank = own_pieces(model, mesh), dist.get_rank()
    own = {name: _Held(first, tuple(rows.shape), rows.dtype) for name, (rows, first) in pieces.items() if len(rows)}
    held = gather_objects(own)
    for spec in tensor_inventory(model.config, "fp32"):
        # A rank waits here for rank 0, for as long as that takes for one tensor, and not in a send for many of them.
        dist.broadcast(torch.zeros(1), 0)
        # By first row, the first of the ranks that have the same piece.
        holders = {of[spec.name].first: r for r, of in reversed(list(enumerate(held))) if spec.name in of}
        if rank == 0:
            yield spec.name, _receive(spec.name, pieces, {r: held[r][spec.name] for r in holders.values()})
        elif rank in holders.values():
            dist.send(pieces[spec.name].rows.cpu().contiguous(), 0)


def _receive(name: str, pieces: dict[str, Piece], held: dict[int, _Held]) -> Tensor:
    """Tensor put together from the pieces of the ranks that `held` names."""
    some = next(iter(held.values()))
    whole = torch.empty(sum(piece.shape[0] for piece in held.values()), *some.shape[1:], dtype=some.dtype)
    for rank, (first, shape, _) in held.items():
        part = whole[first : first + shape[0]]
        if rank == 0:
            part.copy_(pieces[name].rows)
        else:
            dist.recv(part, rank)
    return whole
