"""mHC: four residual streams, mixed before and after each sub-layer by token-dependent maps. fp32 inside.

Source: mHC paper; official inference kernel. fn rows and base entries: first the pre weights, then post, then the
combine matrix (row-major, [source stream, target stream]).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.kernels.mhc import collect, distribute, mixes
from dsv4.kernels.sinkhorn import sinkhorn


def _sigmoid(x: Tensor) -> Tensor:
    # exp has the same bits in an array's vector body and its tail; torch.sigmoid does not.
    return x.neg().exp().add(1.0).reciprocal()


def hc_weights(mix: Tensor, scale: Tensor, base: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(pre [T, s], post [T, s], comb [T, s, s]) from the mixes [T, s * (2 + s)]; s = hc_mult."""
    s = config.hc_mult
    pre, post, comb = (mix * scale.repeat_interleave(_counts(s, mix.device)) + base).split((s, s, s * s), dim=1)
    post = 2.0 * _sigmoid(post)
    return (
        _sigmoid(pre) + config.hc_eps,
        post,
        sinkhorn(comb.reshape(-1, s, s), config.hc_sinkhorn_iters, config.hc_eps),
    )


@cache
def _counts(s: int, device: torch.device) -> Tensor:
    """How many of a site's mixes are pre, post and combine weights."""
    return torch.tensor((s, s, s * s), device=device)


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [T, s, d] -> (sub-layer input [T, d], post [T, s], comb [T, s, s])."""
    pre, post, comb = hc_weights(mixes(streams, fn, config.rms_norm_eps), scale, base, config)
    return collect(pre, streams), post, comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Sub-layer output y [T, d] back into the streams: out_k = post_k * y + sum_j comb_jk * stream_j -> [T, s, d]."""
    return distribute(y, streams, post, comb)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig) -> Tensor:
    """Read the streams out: [T, s, d] -> [T, d]. No normalisation of the weights."""
    mix = mixes(streams, fn, config.rms_norm_eps)
    return collect(_sigmoid(mix * scale + base) + config.hc_eps, streams)
