"""mHC in torch. The three maps over the wide streams (mixes, collect, distribute) have hand-written gradients: autograd
would store and traverse several copies of the streams. The rest is a few numbers per token."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.kernels.linear import linear_fp32
from dsv4.kernels.norm import rms_norm
from dsv4.kernels.sinkhorn import sinkhorn


class Sizes(Protocol):
    """Constants of mHC, under their names in a model's configuration."""

    @property
    def hc_mult(self) -> int: ...
    @property
    def hc_sinkhorn_iters(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def hc_eps(self) -> float: ...


def _project(streams: Tensor, fn: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(fn . X [T, m], rsqrt(mean(X^2) + eps) [T, 1]) of the flattened streams X."""
    flat = streams.flatten(1).float()
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    return linear_fp32(flat, fn.float()), norm.square_().div_(flat.shape[1]).add_(eps).rsqrt_()


def _collect(weights: Tensor, streams: Tensor) -> Tensor:
    return torch.bmm(weights.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)


def _distribute(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    added = post.unsqueeze(-1) * y.float().unsqueeze(1)
    return added.baddbmm_(comb.mT, streams.float()).to(streams.dtype)


class _Mixes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, fn: Tensor, eps: float) -> Tensor:
        raw, inverse = _project(streams, fn, eps)
        ctx.save_for_backward(streams, fn, raw, inverse)
        return raw * inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        streams, fn, raw, inverse = ctx.saved_tensors
        flat = streams.flatten(1).float()
        d_raw = grad * inverse
        # inverse = (|X|^2 / n + eps)^-1/2, so d inverse / dX = -inverse^3 / n * X
        d_inverse = (grad * raw).sum(-1, keepdim=True)
        pull = d_inverse * inverse.pow(3).neg_().div_(flat.shape[1])
        d_flat = torch.mul(flat, pull).addmm_(d_raw, fn.float())
        return d_flat.view_as(streams).to(streams.dtype), (d_raw.mT @ flat).to(fn.dtype), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, streams: Tensor) -> Tensor:
        ctx.save_for_backward(weights, streams)
        return _collect(weights, streams)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, streams = ctx.saved_tensors
        g = grad.float()
        d_weights = torch.bmm(streams.float(), g.unsqueeze(-1)).squeeze(-1)
        return d_weights, (weights.unsqueeze(-1) * g.unsqueeze(1)).to(streams.dtype)


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(y, streams, post, comb)
        return _distribute(y, streams, post, comb)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, streams, post, comb = ctx.saved_tensors
        g = grad.float()
        d_y = torch.bmm(post.unsqueeze(1), g).squeeze(1)
        d_post = torch.bmm(g, y.float().unsqueeze(-1)).squeeze(-1)
        d_streams = torch.bmm(comb, g)
        d_comb = torch.bmm(streams.float(), g.mT)
        return d_y.to(y.dtype), d_streams.to(streams.dtype), d_post, d_comb


def mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Normed projection of the flattened streams [T, s, d] by fn [m, s * d] -> [T, m] fp32."""
    if not torch.is_grad_enabled():
        raw, inverse = _project(streams, fn, eps)
        return raw.mul_(inverse)
    return _Mixes.apply(streams, fn, eps)


def collect(weights: Tensor, streams: Tensor) -> Tensor:
    """Weighted sum of the streams [T, s, d] by weights [T, s] -> [T, d]."""
    return _Collect.apply(weights, streams) if torch.is_grad_enabled() else _collect(weights, streams)


def distribute(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write y [T, d] into the streams [T, s, d]: post [T, s] times y, plus the streams mixed by comb [T, s, s]."""
    if not torch.is_grad_enabled():
        return _distribute(y, streams, post, comb)
    return _Distribute.apply(y, streams, post, comb)


def _sigmoid(x: Tensor) -> Tensor:
    # exp gives the same bits in an array's vector body and its scalar tail; torch.sigmoid does not.
    return x.neg().exp().add(1.0).reciprocal()


@cache
def _counts(s: int, device: torch.device) -> Tensor:
    """Numbers of pre, post and combine weights of a site."""
    return torch.tensor((s, s, s * s), device=device)


def hc_weights(mix: Tensor, scale: Tensor, base: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(pre [T, s], post [T, s], comb [T, s, s]) from the mixes [T, s * (2 + s)]; s = hc_mult."""
    s = sizes.hc_mult
    pre, post, comb = (mix * scale.repeat_interleave(_counts(s, mix.device)) + base).split((s, s, s * s), dim=1)
    post = 2.0 * _sigmoid(post)
    return (
        _sigmoid(pre) + sizes.hc_eps,
        post,
        sinkhorn(comb.reshape(-1, s, s), sizes.hc_sinkhorn_iters, sizes.hc_eps),
    )


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [T, s, d] -> (normed sub-layer input [T, d], post [T, s], comb [T, s, s])."""
    pre, post, comb = hc_weights(mixes(streams, fn, sizes.rms_norm_eps), scale, base, sizes)
    return rms_norm(collect(pre, streams), sizes.rms_norm_eps, norm), post, comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write y [T, d] into the streams [T, s, d]: out_k = post_k * y + sum_j comb_jk * stream_j -> [T, s, d]."""
    return distribute(y, streams, post, comb)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sizes: Sizes) -> Tensor:
    """Read the streams out: [T, s, d] -> [T, d]."""
    mix = mixes(streams, fn, sizes.rms_norm_eps)
    return collect(_sigmoid(mix * scale + base) + sizes.hc_eps, streams)
