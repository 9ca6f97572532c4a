"""mHC: four residual streams, mixed before and after each sub-layer by token-dependent maps. fp32 inside.

Source: architecture notes 2.1. fn rows and base entries: first the pre weights, then post, then the combine matrix
(row-major, [source stream, target stream]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.kernels.linear import linear
from dsv4.kernels.sinkhorn import sinkhorn


def _sigmoid(x: Tensor) -> Tensor:
    # exp has the same bits in an array's vector body and its tail; torch.sigmoid does not.
    return 1.0 / (1.0 + (-x).exp())


def _mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = streams.flatten(1).float()
    return linear(flat, fn) * (flat.square().mean(-1, keepdim=True) + eps).rsqrt()


def _weighted_sum(weights: Tensor, streams: Tensor) -> Tensor:
    """weights [T, s], streams [T, s, d] -> [T, d], in fp32, cast to the streams' dtype."""
    return torch.bmm(weights.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)


def hc_weights(mix: Tensor, scale: Tensor, base: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(pre [T, s], post [T, s], comb [T, s, s]) from the mixes [T, s * (2 + s)]; s = hc_mult."""
    s = config.hc_mult
    pre = _sigmoid(mix[:, :s] * scale[0] + base[:s]) + config.hc_eps
    post = 2.0 * _sigmoid(mix[:, s : 2 * s] * scale[1] + base[s : 2 * s])
    logits = mix[:, 2 * s :] * scale[2] + base[2 * s :]
    return pre, post, sinkhorn(logits.view(-1, s, s), config.hc_sinkhorn_iters, config.hc_eps)


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [T, s, d] -> (sub-layer input [T, d], post [T, s], comb [T, s, s])."""
    pre, post, comb = hc_weights(_mixes(streams, fn, config.rms_norm_eps), scale, base, config)
    return _weighted_sum(pre, streams), post, comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Sub-layer output y [T, d] back into the streams: out_k = post_k * y + sum_j comb_jk * stream_j -> [T, s, d]."""
    added = post.unsqueeze(-1) * y.float().unsqueeze(1)
    return torch.baddbmm(added, comb.mT, streams.float()).to(streams.dtype)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig) -> Tensor:
    """Read the streams out: [T, s, d] -> [T, d]. No normalisation of the weights."""
    mix = _mixes(streams, fn, config.rms_norm_eps)
    return _weighted_sum(_sigmoid(mix * scale + base) + config.hc_eps, streams)
