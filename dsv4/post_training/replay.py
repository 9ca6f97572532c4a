"""Replay of a rollout's discrete choices in training: experts, compressed entries, sampling mask (V3.2, V4).

The sampling mask comes from the sampler itself. Experts and entries are recorded by one more forward over the finished
documents, with the weights that sampled them: no result depends on how a sequence is cut into steps, so on CPUs these
are the engine's choices, whatever chunks, cached prefixes and preemptions it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dsv4.engine.sampling_params import LogprobsMode
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.choices import Choices, document_choices, laid_entries, laid_experts, noted_choices
from dsv4.model.transformer import Transformer
from dsv4.post_training.rollouts import Rollout, Sampled, packed


@dataclass(frozen=True)
class ReplaySettings:
    """Choices of a rollout that training keeps."""

    routing: bool = False  # experts of score-routed layers
    indexer: bool = False  # entries of CSA layers
    sampling_mask: bool = True  # tokens that top_k, top_p and min_p keep

    @property
    def logprobs_mode(self) -> LogprobsMode:
        return "processed_logprobs" if self.sampling_mask else "tempered_logprobs"


@torch.no_grad()
def record_choices(
    model: Transformer, rollouts: Sequence[Sampled], tokens: int, settings: ReplaySettings
) -> list[Sampled]:
    """The rollouts with the choices that `settings` keeps, of a model that has the weights that sampled them.

    One forward over every document, at most `tokens` tokens at a time; none if no such choice is kept. Episodes are
    not recorded: none may be among them then. Rollouts that failed come first, as they are.
    """
    if not (settings.routing or settings.indexer):
        return list(rollouts)
    found = [rollout for rollout in rollouts if rollout.error is not None]
    for micro in packed((rollout for rollout in rollouts if rollout.error is None), tokens):
        batch = RaggedBatch.pack([rollout.document for rollout in micro], device=model.device)
        with noted_choices(model) as notes:
            ReferenceBackend(model).run(batch, None)
        for rollout, choices in zip(
            micro, document_choices(notes, batch.lengths.tolist(), model.config.index_topk), strict=True
        ):
            kept = Choices(choices.experts if settings.routing else {}, choices.entries if settings.indexer else {})
            assert isinstance(rollout, Rollout)
            found.append(replace(rollout, choices=kept))
    return found


def replaying(rollouts: Sequence[Sampled], device: torch.device) -> AuxLosses:
    """Auxiliary losses of a forward over the rollouts' documents, laid end to end, that replays what is recorded."""
    recorded = [rollout.choices for rollout in rollouts if rollout.choices is not None]
    if not recorded:
        return AuxLosses()
    if len(recorded) < len(rollouts):
        missing = len(rollouts) - len(recorded)
        raise ValueError(f"{missing} of {len(rollouts)} rollouts have no recorded choices; allowed: all or none")
    lengths = [rollout.num_document for rollout in rollouts]
    entries = laid_entries(recorded, lengths, device)
    return AuxLosses(laid_experts(recorded, device), entries=entries, compare=True)
