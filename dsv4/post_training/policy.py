"""Log-probabilities of chosen tokens under a head, differentiable, with the sampler's bits; logits are never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels.linear import linear
from dsv4.kernels.sampling import unpack_masks
from dsv4.post_training.head_gradient import HeadGradient, row_chunks

CHUNK = 1024  # tokens whose logits are in memory at a time


def token_log_probabilities(
    hidden: Tensor,
    head: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    kept: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """log p(token) fp32 [n] of `token_ids` int64 [n] after hidden states [n, d] under a head [V, d].

    `kept` bool [n, V], or a bit per token, uint8 [n, ceil(V / 8)] (kernels/sampling): the tokens that the sampler could
    draw (Keep Sampling Mask); the others have probability 0. None: all. On one device, the bits are those of the
    engine's `logprobs` at that temperature. Differentiable in hidden and head. ValueError for a temperature that is not
    above 0, or a token that is not kept.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; allowed: more than 0")
    if kept is not None and not bool((drawable := _drawable(kept, token_ids)).all()):
        place = int((~drawable).nonzero()[0])
        raise ValueError(
            f"token {int(token_ids[place])} at place {place} was sampled, but its sampling mask forbids it"
        )
    return _TokenLogProbabilities.apply(hidden, head, token_ids, temperature, kept, chunk)


def _drawable(kept: Tensor, token_ids: Tensor) -> Tensor:
    """bool [n]: True where the mask keeps the token."""
    if kept.dtype == torch.bool:
        return kept.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    words = kept.gather(1, (token_ids // 8).unsqueeze(1)).squeeze(1).long()
    return (words >> (token_ids % 8)) & 1 == 1


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
    logits = linear(hidden.float(), head.float())
    if temperature != 1.0:
        logits = logits / temperature
    if kept is not None:
        mask = kept if kept.dtype == torch.bool else unpack_masks(kept, logits.shape[1])
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.log_softmax(-1)


class _TokenLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, token_ids: Tensor, temperature: float, kept: Tensor | None, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, head, token_ids, kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in row_chunks(len(hidden), chunk):
            mask = None if kept is None else kept[rows]
            log_p = _log_softmax(hidden[rows], head, temperature, mask)
            out[rows] = log_p.gather(1, token_ids[rows].unsqueeze(1)).squeeze(1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, head, token_ids, kept = ctx.saved_tensors
        found = HeadGradient(hidden, head, ctx.needs_input_grad[:2])
        for rows in row_chunks(len(hidden), ctx.chunk):
            mask = None if kept is None else kept[rows]
            d_logits = _log_softmax(hidden[rows], head, ctx.temperature, mask).exp_().neg_()
            d_logits.scatter_add_(1, token_ids[rows].unsqueeze(1), torch.ones_like(d_logits[:, :1]))
            found.add(rows, d_logits.mul_((grad[rows] / ctx.temperature).unsqueeze(1)))
        return (*found.result(), None, None, None, None)
