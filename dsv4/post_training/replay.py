"""Replay of a rollout's discrete choices in training: experts, compressed entries, sampling mask (V3.2, V4).

All three come from the engine that sampled: experts and entries as its steps' forwards chose them (engine/choices.py),
whatever device, chunks, cached prefixes, preemptions and other workers it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.engine.sampling_params import LogprobsMode
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.choices import laid_choices
from dsv4.model.transformer import Transformer
from dsv4.post_training.rollouts import Sampled


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Choices of a rollout that training keeps."""

    routing: bool = False  # experts of score-routed layers
    indexer: bool = False  # entries of CSA layers
    sampling_mask: bool = True  # tokens that top_k, top_p and min_p keep

    @property
    def logprobs_mode(self) -> LogprobsMode:
        return "processed_logprobs" if self.sampling_mask else "tempered_logprobs"

    @property
    def engine_options(self) -> dict[str, bool]:
        """Options of the engine that samples."""
        return {"enable_return_routed_experts": self.routing, "enable_return_indexer_topk": self.indexer}


def replaying(rollouts: Sequence[Sampled], model: Transformer) -> AuxLosses:
    """Auxiliary losses of a forward over the rollouts' documents, laid end to end, that replays what is recorded.

    A document's last token, which no engine has computed, runs what the model chooses now.
    """
    choices = [rollout.choices for rollout in rollouts]
    recorded = [one for one in choices if one is not None]
    if not recorded:
        return AuxLosses()
    if len(recorded) < len(rollouts):
        missing = len(rollouts) - len(recorded)
        raise ValueError(f"{missing} of {len(rollouts)} rollouts have no recorded choices; allowed: all or none")
    lengths = [rollout.num_document for rollout in rollouts]
    experts, entries = laid_choices(model.config, recorded, lengths, model.device)
    return AuxLosses(experts, entries=entries, compare=True)
