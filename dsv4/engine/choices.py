"""Experts and entries that the steps' forwards choose, recorded by request: `RequestOutput.routed_experts`.

A position's choices are those of the forward that its next token was drawn from: what is recorded stays, whatever is
computed once more. Prefixes are stored with theirs, which are in no count of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from dsv4.cache import PrefixEntry
from dsv4.config import ModelConfig
from dsv4.engine.config import EngineConfig
from dsv4.engine.model import EngineModel
from dsv4.engine.request import Request
from dsv4.engine.step import ScheduledChunk
from dsv4.model.choices import ChoiceNotes, Choices
from dsv4.model.transformer import Transformer


class ChoiceRecorder:
    """Records what is chosen for the tokens of every request: experts of score-routed layers, entries of indexers."""

    def __init__(self, config: ModelConfig, device: torch.device, experts: bool, entries: bool) -> None:
        self._config, self._device, self._kinds = config, device, (experts, entries)
        self._stored: WeakKeyDictionary[PrefixEntry, tuple[Choices, ...]] = WeakKeyDictionary()

    def notes(self, tokens: int) -> ChoiceNotes:
        """Memory for the choices of a step of so many tokens."""
        return ChoiceNotes.of(self._config, tokens, self._device, *self._kinds)

    def take(self, chunks: Sequence[ScheduledChunk], notes: ChoiceNotes) -> None:
        """After a step whose drafts are verified: those of the tokens that stand go to their requests."""
        found, first = notes.choices(), 0
        for chunk in chunks:
            request = chunk.request
            computed = request.num_computed_tokens - chunk.start
            request.choices.add(chunk.start, found[first : first + computed])
            first += chunk.num_tokens
            if request.finished:
                whole = request.choices.part(0, request.choices.length)
                request.output.routed_experts, request.output.indexer_topk = whole.experts, whole.entries

    def begin(self, request: Request, prefix: PrefixEntry) -> None:
        """A request goes on from a stored prefix."""
        request.choices.add(0, *self._stored[prefix])

    def store(self, request: Request, prefix: PrefixEntry) -> None:
        """A prefix was stored with a request's tokens, or was there already."""
        if prefix not in self._stored:
            self._stored[prefix] = request.choices.seal(prefix.length)


def new_recorder(model: EngineModel, config: EngineConfig) -> ChoiceRecorder | None:
    """The recorder that the options ask for; ValueError for a model that tells nothing."""
    experts, entries = config.enable_return_routed_experts, config.enable_return_indexer_topk
    if not (experts or entries):
        return None
    if not isinstance(model, Transformer):
        name = "enable_return_routed_experts" if experts else "enable_return_indexer_topk"
        raise ValueError(f"{name} is True; a {type(model).__name__} does not tell what it chooses")
    return ChoiceRecorder(model.config, model.device, experts, entries)
