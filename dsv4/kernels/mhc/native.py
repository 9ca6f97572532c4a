"""mHC on the native kernels; fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels import cpu
from dsv4.kernels.mhc.reference import Sizes


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [T, s, d] -> (normed sub-layer input [T, d], post [T, s], comb [T, s, s])."""
    T, s, d = streams.shape
    weights, x = torch.empty(T, s * (2 + s)), torch.empty(T, d)
    site = [t.detach().contiguous() for t in (streams, fn, scale, base, norm)]
    cpu.kernels().hc_pre(*site, sizes.hc_sinkhorn_iters, sizes.rms_norm_eps, sizes.hc_eps, weights, x)
    _, post, comb = weights.split((s, s, s * s), dim=1)
    return x, post, comb.reshape(-1, s, s)


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write the sub-layer output y [T, d] into the streams [T, s, d] -> [T, s, d]."""
    out = streams.detach().clone(memory_format=torch.contiguous_format)
    unread = torch.zeros_like(post)  # the place of the pre weights
    weights = torch.cat((unread, post, comb.flatten(1)), dim=1)
    cpu.kernels().hc_post(y.detach().contiguous(), weights.detach(), out)
    return out
