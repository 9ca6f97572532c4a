"""Discrete choices of a forward: the experts and the compressed entries of each token, noted while the modules run.

Replayed by `AuxLosses.routing` and `AuxLosses.entries`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsv4.config import CSA
from dsv4.model.attention import Attention
from dsv4.model.moe import MoE


@dataclass(frozen=True)
class Choices:
    """Choices of one document's tokens, on the CPU, by module name.

    experts: int16 [tokens, k] of score-routed layers ("layers.3.ffn"). entries: int32 [rows, index_topk] of layers with
    an indexer ("layers.2.attn"), ascending, for the tokens from position `first_choice(index_topk)` on: those before
    see no more than index_topk entries and read all.
    """

    experts: Mapping[str, Tensor]
    entries: Mapping[str, Tensor]


@dataclass
class Notes:
    """Choices of one ragged batch: experts int64 [T, k]; entries int64 [T, index_topk], None where all are read."""

    experts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    entries: dict[str, Tensor | None] = field(default_factory=dict[str, "Tensor | None"])


def first_choice(top_k: int) -> int:
    """Position of the first token that sees more than `top_k` entries of a CSA layer."""
    return (top_k + 1) * CSA.ratio - 1


@contextmanager
def noted_choices(model: nn.Module) -> Iterator[Notes]:
    """Notes of every score-routed and every indexer's layer, filled by the next forward on the modules."""
    notes = Notes()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, MoE) and module.gate.tid2eid is None:
                hooks.callback(module.gate.register_forward_hook(_gate_hook(notes, module.name)).remove)
            elif isinstance(module, Attention) and module.indexer is not None:
                hooks.enter_context(_watched(module, notes))
        yield notes


def _gate_hook(notes: Notes, name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        notes.experts[name] = output[1]

    return hook


@contextmanager
def _watched(layer: Attention, notes: Notes) -> Iterator[None]:
    def take(chosen: Tensor | None) -> None:
        notes.entries[layer.name] = chosen

    notes.entries[layer.name] = None
    layer.choice_watcher = take
    try:
        yield
    finally:
        layer.choice_watcher = None


def document_choices(notes: Notes, lengths: list[int], top_k: int) -> list[Choices]:
    """Notes of a batch of whole documents, document by document."""
    first = first_choice(top_k)
    experts = {name: index.to(torch.int16).cpu().split(lengths) for name, index in notes.experts.items()}
    entries = {
        name: [part[first:] for part in chosen.to(torch.int32).cpu().split(lengths)]
        for name, chosen in notes.entries.items()
        if chosen is not None
    }
    none = torch.empty(0, top_k, dtype=torch.int32)
    return [
        Choices(
            {name: parts[place].clone() for name, parts in experts.items()},
            {name: entries[name][place].clone() if name in entries else none for name in notes.entries},
        )
        for place in range(len(lengths))
    ]


def laid_experts(documents: list[Choices], device: torch.device) -> dict[str, Tensor]:
    """Experts of documents laid end to end, as `AuxLosses.routing` takes them."""
    names = documents[0].experts
    return {name: torch.cat([one.experts[name] for one in documents]).to(device, torch.int64) for name in names}


def laid_entries(documents: list[Choices], lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    """Entries of documents laid end to end, as `AuxLosses.entries` takes them."""
    found: dict[str, Tensor] = {}
    for name, sample in documents[0].entries.items():
        parts = [one.entries[name] for one in documents]
        free = [length - len(part) for part, length in zip(parts, lengths, strict=True)]
        rows = [
            row for part, n in zip(parts, free, strict=True) for row in (part.new_full((n, sample.shape[1]), -1), part)
        ]
        found[name] = torch.cat(rows).to(device, torch.int64)
    return found
