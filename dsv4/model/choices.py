"""Discrete choices of a forward: the experts and the compressed entries of each token, noted as its layers make them.

Replayed by `AuxLosses.routing` and `AuxLosses.entries`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dsv4.config import COMPRESSION_KINDS, ModelConfig
from dsv4.model.block import Block


def routed_layers(config: ModelConfig) -> list[int]:
    """Numbers of the main layers whose router chooses by score."""
    return list(range(config.num_hash_layers, config.num_hidden_layers))


def indexed_layers(config: ModelConfig) -> list[int]:
    """Numbers of the main layers with an indexer."""
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return [index for index, ratio in enumerate(ratios) if COMPRESSION_KINDS[ratio].has_indexer]


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices of tokens laid end to end, of all layers that choose, in their order; None: those were not noted.

    experts: int16 [T, routed layers, k] ascending. entries: int32 [T, indexed layers, index_topk] ascending, all -1
    where a token sees no more than index_topk entries and reads all.
    """

    experts: np.ndarray | None = None
    entries: np.ndarray | None = None

    def __getitem__(self, tokens: slice) -> Choices:
        """Those of some tokens, in the same memory."""
        return Choices(*(None if part is None else part[tokens] for part in (self.experts, self.entries)))

    def copy(self) -> Choices:
        return Choices(*(None if part is None else part.copy() for part in (self.experts, self.entries)))

    def __len__(self) -> int:
        return next((len(part) for part in (self.experts, self.entries) if part is not None), 0)

    @staticmethod
    def joined(parts: Sequence[Choices]) -> Choices:
        """Parts, of which there is at least one, end to end."""
        experts, entries = [one.experts for one in parts], [one.entries for one in parts]
        return Choices(
            None if parts[0].experts is None else np.concatenate(cast("list[np.ndarray]", experts)),
            None if parts[0].entries is None else np.concatenate(cast("list[np.ndarray]", entries)),
        )


class RecordedChoices:
    """Choices of a sequence from its first token on, growing. Parts are shared with stored prefixes, never written."""

    def __init__(self) -> None:
        self.length = 0  # tokens
        self._sealed: list[Choices] = []
        self._new: list[Choices] = []

    def add(self, start: int, *parts: Choices) -> None:
        """Take in those of the tokens from position `start` on, end to end; those that are known stay."""
        assert start <= self.length, "no token is skipped"
        for part in parts:
            start += len(part)
            if start > self.length:
                new = len(part) - (start - self.length)
                self._new.append(part[new:].copy() if new else part.copy())
                self.length = start

    def part(self, start: int, stop: int) -> Choices:
        """Those of the positions from `start` to `stop`, at least one."""
        found: list[Choices] = []
        end = self.length
        for part in reversed(self._sealed + self._new):
            if end <= start:
                break
            begin = end - len(part)
            if begin < stop:
                found.append(part[max(start - begin, 0) : stop - begin])
            end = begin
        return Choices.joined(found[::-1])

    def seal(self, length: int) -> tuple[Choices, ...]:
        """Those of the first `length` tokens, at least one, to be kept by others."""
        if length < self.length:
            return (self.part(0, length),)
        if self._new:
            self._sealed.append(Choices.joined(self._new))
            self._new.clear()
        return tuple(self._sealed)


@dataclass(frozen=True, eq=False)
class ChoiceNotes:
    """Memory for the choices of one forward, on its device; see `Choices`."""

    experts: Tensor | None
    entries: Tensor | None

    @staticmethod
    def of(
        config: ModelConfig, tokens: int, device: torch.device, experts: bool = True, entries: bool = True
    ) -> ChoiceNotes:
        """Notes of a batch of so many tokens, of the main layers' experts, of their entries, or of both."""
        routed, indexed = len(routed_layers(config)), len(indexed_layers(config))
        shapes = (tokens, routed, config.num_experts_per_tok), (tokens, indexed, config.index_topk)
        return ChoiceNotes(
            torch.full(shapes[0], -1, dtype=torch.int16, device=device) if experts else None,
            torch.full(shapes[1], -1, dtype=torch.int32, device=device) if entries else None,
        )

    def choices(self) -> Choices:
        """The notes so far."""
        return Choices(*(None if part is None else part.cpu().numpy() for part in (self.experts, self.entries)))


@contextmanager
def noting(config: ModelConfig, layers: nn.ModuleList, notes: ChoiceNotes) -> Iterator[None]:
    """Context in which the next forward of the modules, the model's main layers, fills the notes."""
    with ExitStack() as hooks:
        for place, index in enumerate(routed_layers(config) if notes.experts is not None else ()):
            gate = cast(Block, layers[index]).ffn.gate
            hooks.callback(gate.register_forward_hook(_gate_hook(cast(Tensor, notes.experts)[:, place])).remove)
        for place, index in enumerate(indexed_layers(config) if notes.entries is not None else ()):
            attention = cast(Block, layers[index]).attn
            attention.choice_watcher = _watcher(cast(Tensor, notes.entries)[:, place])
            hooks.callback(setattr, attention, "choice_watcher", None)
        yield


def _gate_hook(to: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        to.copy_(output[1])

    return hook


def _watcher(to: Tensor) -> Callable[[Tensor | None], None]:
    def take(chosen: Tensor | None) -> None:
        if chosen is not None:
            to.copy_(chosen)

    return take


def laid_choices(
    config: ModelConfig, documents: Sequence[Choices], lengths: Sequence[int], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(experts, entries) of documents laid end to end, as `AuxLosses` takes them; -1 for tokens without a choice.

    `lengths`: tokens of each document, as many as its choices or more: for the others the layers choose themselves.
    """
    experts = _laid([one.experts for one in documents], lengths, device)
    entries = _laid([one.entries for one in documents], lengths, device)
    return (
        {f"layers.{index}.ffn": part for index, part in zip(routed_layers(config), experts, strict=False)},
        {f"layers.{index}.attn": part for index, part in zip(indexed_layers(config), entries, strict=False)},
    )


def _laid(parts: Sequence[np.ndarray | None], lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """Each layer's rows int64 [tokens, k] of documents laid end to end; none if nothing was noted."""
    if any(part is None for part in parts):
        return []
    rows = [
        np.pad(part, ((0, length - len(part)), (0, 0), (0, 0)), constant_values=-1)
        for part, length in zip(cast("Sequence[np.ndarray]", parts), lengths, strict=True)
    ]
    return list(torch.from_numpy(np.concatenate(rows)).to(device, torch.int64).unbind(1))
