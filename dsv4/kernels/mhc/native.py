"""mHC on the native kernels, with its gradients; fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.kernels import backends, cpu
from dsv4.kernels.mhc.reference import Sizes


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().contiguous() for t in tensors]


def _read(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    T, s, d = streams.shape
    weights, x = torch.empty(T, s * (2 + s)), torch.empty(T, d)
    site = _contiguous(streams, fn, scale, base, norm)
    cpu.kernels().hc_pre(*site, sizes.hc_sinkhorn_iters, sizes.rms_norm_eps, sizes.hc_eps, weights, x)
    _, post, comb = weights.split((s, s, s * s), dim=1)
    return x, post.contiguous(), comb.reshape(-1, s, s)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, sizes: Sizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(streams, fn, scale, base, norm)
        ctx.sizes = sizes
        return _read(streams, fn, scale, base, norm, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_post: Tensor, d_comb: Tensor) -> tuple[Tensor | None, ...]:
        site, pulls = _contiguous(*ctx.saved_tensors), _contiguous(d_x, d_post, d_comb)
        d_streams, d_fn, d_scale, d_base, d_norm = grads = [torch.empty_like(t) for t in site]
        sizes = (ctx.sizes.hc_sinkhorn_iters, ctx.sizes.rms_norm_eps, ctx.sizes.hc_eps)
        cpu.kernels().hc_pre_gradient(*site, *sizes, *pulls, d_streams, d_fn, d_scale, d_base, d_norm)
        return *grads, None


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [T, s, d] -> (normed sub-layer input [T, d], post [T, s], comb [T, s, s])."""
    op = _Read.apply if backends.records(streams, fn, scale, base, norm) else _read
    return op(streams, fn, scale, base, norm, sizes)


def _write(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    out = streams.detach().clone(memory_format=torch.contiguous_format)
    unread = torch.zeros_like(post)  # the place of the pre weights
    weights = torch.cat((unread, post, comb.flatten(1)), dim=1)
    cpu.kernels().hc_post(y.detach().contiguous(), weights.detach(), out)
    return out


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(y, streams, post, comb)
        return _write(y, streams, post, comb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = _contiguous(*ctx.saved_tensors)
        grads = tuple(torch.empty_like(t) for t in inputs)
        cpu.kernels().hc_post_gradient(grad.contiguous(), *inputs, *grads)
        return grads


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write the sub-layer output y [T, d] into the streams [T, s, d] -> [T, s, d]."""
    return (_Write.apply if backends.records(y, streams, post, comb) else _write)(y, streams, post, comb)


def _head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sizes: Sizes) -> Tensor:
    x = torch.empty(streams.shape[0], streams.shape[2])
    site = _contiguous(streams, fn, scale, base)
    cpu.kernels().hc_head(*site, sizes.rms_norm_eps, sizes.hc_eps, x)
    return x


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(streams, fn, scale, base)
        ctx.sizes = sizes
        return _head(streams, fn, scale, base, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        site = _contiguous(*ctx.saved_tensors)
        grads = [torch.empty_like(t) for t in site]
        sizes = (0, ctx.sizes.rms_norm_eps, ctx.sizes.hc_eps)
        cpu.kernels().hc_pre_gradient(*site, None, *sizes, grad.contiguous(), None, None, *grads, None)
        return *grads, None


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sizes: Sizes) -> Tensor:
    """Read the streams out: [T, s, d] -> [T, d]."""
    op = _Head.apply if backends.records(streams, fn, scale, base) else _head
    return op(streams, fn, scale, base, sizes)
