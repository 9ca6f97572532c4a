"""Log-likelihood of token sequences under a model, many in one ragged batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv4.kernels.gather import take_rows
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.training.losses import following_ids

BATCH_TOKENS = 8192


@torch.no_grad()
def log_likelihoods(model: Transformer, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
    """Sum over the ids from `starts[i]` on of their log-probabilities, in nats, for each sequence.

    A start is 1 or more and less than the sequence's length: the first token has nothing before it.
    """
    for number, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        if not 1 <= start < len(ids):
            raise ValueError(f"sequence {number} of {len(ids)} ids from {start} on; allowed: 1 to {len(ids) - 1}")
    found: list[float] = []
    group: list[int] = []
    for number, ids in enumerate(sequences):
        if group and sum(len(sequences[n]) for n in group) + len(ids) > BATCH_TOKENS:
            found += _group(model, [sequences[n] for n in group], [starts[n] for n in group])
            group = []
        group.append(number)
    if group:
        found += _group(model, [sequences[n] for n in group], [starts[n] for n in group])
    return found


def _group(model: Transformer, sequences: list[Sequence[int]], starts: list[int]) -> list[float]:
    device = model.embed.weight.device
    batch = RaggedBatch.pack([list(ids) for ids in sequences], device=device)
    streams = model.forward_ragged(batch)
    following = following_ids(batch)
    sums: list[float] = []
    end = 0
    for ids, start in zip(sequences, starts, strict=True):
        rows = torch.arange(end + start - 1, end + len(ids) - 1, device=device)
        loss, _ = model.cross_entropy(take_rows(streams, rows), following[rows])
        sums.append(-float(loss))
        end += len(ids)
    return sums
