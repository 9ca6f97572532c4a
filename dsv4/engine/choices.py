"""Experts and entries that the steps' forwards choose, recorded by request: `RequestOutput.routed_experts`.

A position's choices are those of the forward that its next token was drawn from: what is recorded stays, whatever is
computed once more. Prefixes are stored with theirs, which are in no count of bytes.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from dsv4.cache import PrefixEntry
from dsv4.config import ModelConfig
from dsv4.engine.config import EngineConfig
from dsv4.engine.model import EngineModel
from dsv4.model.choices import ChoiceNotes, Choices, RecordedChoices
from dsv4.model.transformer import Transformer


class ChoiceRecorder:
    """Memory for what steps choose, experts of score-routed layers and entries of indexers, and what prefixes keep."""

    def __init__(self, config: ModelConfig, device: torch.device, experts: bool, entries: bool) -> None:
        self._config, self._device, self._kinds = config, device, (experts, entries)
        self._stored: WeakKeyDictionary[PrefixEntry, tuple[Choices, ...]] = WeakKeyDictionary()

    def notes(self, tokens: int) -> ChoiceNotes:
        """Memory for the choices of a step of so many tokens."""
        return ChoiceNotes.of(self._config, tokens, self._device, *self._kinds)

    def begin(self, choices: RecordedChoices, prefix: PrefixEntry) -> None:
        """A request goes on from a stored prefix."""
        choices.add(0, *self._stored[prefix])

    def store(self, choices: RecordedChoices, prefix: PrefixEntry) -> None:
        """A prefix was stored with a request's tokens, or was there already."""
        if prefix not in self._stored:
            self._stored[prefix] = choices.seal(prefix.length)


def new_recorder(model: EngineModel, config: EngineConfig) -> ChoiceRecorder | None:
    """The recorder that the options ask for; ValueError for a model that tells nothing."""
    experts, entries = config.enable_return_routed_experts, config.enable_return_indexer_topk
    if not (experts or entries):
        return None
    if not isinstance(model, Transformer):
        name = "enable_return_routed_experts" if experts else "enable_return_indexer_topk"
        raise ValueError(f"{name} is True; a {type(model).__name__} does not tell what it chooses")
    return ChoiceRecorder(model.config, model.device, experts, entries)
