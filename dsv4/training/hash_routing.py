"""Routing tables of hash-routed layers, balanced by token frequency so that no expert starves.

DeepSeek has not published the construction of its tables. Here token ids, most frequent first, are dealt to the least
loaded experts, which makes the expected load even.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def balanced_table(counts: Sequence[float], experts: int, per_token: int, generator: torch.Generator) -> Tensor:
    """Expert ids int64 [len(counts), per_token], distinct and ascending in each row; `generator` breaks ties.

    `counts` are occurrences per token id. An id that never occurs counts as 1/1000 of the rarest one.
    """
    if not 1 <= per_token <= experts:
        raise ValueError(f"per_token is {per_token}; allowed: 1 to the number of experts, {experts}")
    smallest = min((count for count in counts if count > 0), default=1.0) * 1e-3
    weights = [max(float(count), smallest) for count in counts]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    noise = torch.rand(len(weights), per_token, generator=generator, dtype=torch.float64).tolist()
    heap = [(0.0, draw, expert) for expert, draw in enumerate(torch.rand(experts, generator=generator).tolist())]
    heapq.heapify(heap)
    table = torch.empty(len(weights), per_token, dtype=torch.int64)
    for token in order:
        taken = [heapq.heappop(heap) for _ in range(per_token)]
        table[token] = torch.tensor(sorted(expert for _, _, expert in taken))
        for (load, _, expert), draw in zip(taken, noise[token], strict=True):
            heapq.heappush(heap, (load + weights[token], draw, expert))
    return table


def balanced_tables(
    model: torch.nn.Module, counts: Sequence[float], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """(name, balanced table of its own) of every `tid2eid` buffer of `model`."""
    for name, buffer in model.named_buffers():
        if name.endswith("gate.tid2eid"):
            experts = model.get_parameter(name.replace("tid2eid", "weight")).shape[0]
            yield name, balanced_table(counts, experts, buffer.shape[1], generator)


def install_tables(model: torch.nn.Module, counts: Sequence[float], generator: torch.Generator) -> None:
    """Fill every `tid2eid` buffer of `model` with its balanced table."""
    for name, table in balanced_tables(model, counts, generator):
        model.get_buffer(name).copy_(table)
