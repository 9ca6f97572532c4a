"""Sums over the ranks of a group, in a fixed order on each backend: gradients and numbers; what holds on any or all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_ELEMENTS = 1 << 24
T = TypeVar("T")


def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Add up the gradients of the ranks of a group, in fp32; one that a rank lacks counts as zero.

    All ranks have the same parameters in the same order, or the same parts of them.
    """
    bucket: list[Tensor] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        bucket.append(grad.to_local() if isinstance(grad, DTensor) else grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET_ELEMENTS:
            _sum_bucket(bucket, group)
            bucket = []
    if bucket:
        _sum_bucket(bucket, group)


def _sum_bucket(grads: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([grad.flatten().float() for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def sum_numbers(values: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Sums over the ranks, each in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    dist.all_reduce(total, group=group)
    return total.tolist()


def names_on_any(names: Sequence[str], own: Container[str], group: dist.ProcessGroup, device: torch.device) -> set[str]:
    """Those of `names`, which all ranks of a group give in the same order, that are in `own` of any of them."""
    flags = torch.tensor([name in own for name in names], dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True if the tensors of all ranks are finite."""
    flag = torch.tensor(int(all(bool(tensor.isfinite().all()) for tensor in tensors)))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`value` of every rank of a group, in rank order; None: of all ranks."""
    found: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found  # pyright: ignore[reportReturnType]
