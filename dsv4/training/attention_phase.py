"""Attention of a stage: dense first, then a warm-up of the indexer, then sparse (DeepSeek-V4 and V3.2 reports).

- dense: every token reads all the entries that it sees. The indexer has nothing to choose and is not trained.
- warmup: still dense; the indexer alone is trained, by its own loss. All else, router biases too, stays as it is.
- sparse: a token reads the entries that the indexer chooses; everything is trained.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import get_args

from torch import nn

from dsv4.analysis.training_flops import Phase
from dsv4.model.attention.indexer import Indexer

AttentionPhase = Phase
PHASES: tuple[AttentionPhase, ...] = get_args(AttentionPhase)


def trains(phase: AttentionPhase, name: str) -> bool:
    """True if the parameter `name` is trained in `phase`."""
    return phase == "sparse" or (".indexer." in name) == (phase == "warmup")


@contextmanager
def attention_phase(model: nn.Module, phase: AttentionPhase, whole: bool = True) -> Generator[None]:
    """Forward and backward of `model` within are those of `phase`; outside of it the model is as it was.

    whole: False for a pipeline's stage, which may have no indexer. ValueError in a warm-up if no layer has one.
    """
    if phase == "sparse":
        yield
        return
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    if phase == "warmup" and whole and not indexers:
        raise ValueError("the indexer cannot be warmed up: no layer of this model has one (compress_ratios has no 4)")
    before = [(indexer, indexer.top_k, indexer.learns) for indexer in indexers]
    frozen = [p for name, p in model.named_parameters() if p.requires_grad and not trains(phase, name)]
    try:
        for indexer in indexers:
            indexer.top_k, indexer.learns = 0, phase == "warmup"
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for indexer, top_k, learns in before:
            indexer.top_k, indexer.learns = top_k, learns
        for parameter in frozen:
            parameter.requires_grad_(True)
