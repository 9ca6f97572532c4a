"""The model's layers: mHC around attention and experts, and the MTP block. Names are the official checkpoint's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.cache import Cache, LayerCache
from dsv4.config import ModelConfig
from dsv4.kernels.mhc import hc_post, hc_pre
from dsv4.model.attention import Attention
from dsv4.model.attention.attention import Rope
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.layout import Layout
from dsv4.model.linear import Linear
from dsv4.model.moe import MoE
from dsv4.model.norm import RMSNorm
from dsv4.model.recomputed import recomputed


class ForwardContext:
    """Index tables, rotations, token ids, cache and auxiliary losses, shared by all layers of one forward."""

    def __init__(
        self, config: ModelConfig, batch: RaggedBatch, cache: Cache | None, aux: AuxLosses | None, device: torch.device
    ) -> None:
        self.config, self.cache, self.aux = config, cache, aux
        self.token_ids = batch.token_ids.to(device)
        self.layout = Layout(batch, cache, device)
        self._rope: dict[bool, Rope] = {}

    def rope(self, ratio: int) -> Rope:
        """Rotations for layers of this ratio; ratio 0 has its own frequencies."""
        if bool(ratio) not in self._rope:
            self._rope[bool(ratio)] = Rope(self.config, bool(ratio), self.layout)
        return self._rope[bool(ratio)]

    def layer_cache(self, index: int) -> LayerCache | None:
        return self.cache.layers[index] if self.cache is not None else None


def hc_parameters(config: ModelConfig, mixes: int, scales: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """fn [mixes, s * d], base [mixes] and scale [scales] of one mHC site, uninitialized."""
    wide = config.hc_mult * config.hidden_size
    return (
        nn.Parameter(torch.empty(mixes, wide)),
        nn.Parameter(torch.empty(mixes)),
        nn.Parameter(torch.empty(scales)),
    )


class Block(nn.Module):
    """mHC read, attention, mHC write; mHC read, experts, mHC write."""

    def __init__(self, config: ModelConfig, index: int, name: str, quantize: bool) -> None:
        super().__init__()
        self.config, self.index, self.ratio = config, index, config.compress_ratios[index]
        d, s = config.hidden_size, config.hc_mult
        self.attn = Attention(config, f"{name}.attn", self.ratio, quantize)
        self.ffn = MoE(config, f"{name}.ffn", index < config.num_hash_layers, quantize)
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(d, config.rms_norm_eps)
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = hc_parameters(config, s * (2 + s), 3)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = hc_parameters(config, s * (2 + s), 3)

    def forward(self, streams: Tensor, ctx: ForwardContext) -> Tensor:
        """streams [T, hc_mult, d] -> the same shape."""
        c = self.config
        site = self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base
        x, post, comb = hc_pre(streams, *site, self.attn_norm.weight, c)
        y = self.attn(x, ctx.layout, ctx.rope(self.ratio), ctx.layer_cache(self.index), ctx.aux)
        written = hc_post(y, streams, post, comb)
        between = recomputed(written, hc_post, y, streams, post, comb)  # hc_post's gradient keeps them
        site = self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base
        with between.unkept():
            x, post, comb = hc_pre(written, *site, self.ffn_norm.weight, c)
        y = self.ffn(x, ctx.token_ids, ctx.layout, ctx.aux)
        with between.unkept():
            return hc_post(y, written, post, comb)


class MTPBlock(Block):
    """Multi-token prediction: the next token's embedding joins every stream, then one block and its own read-out."""

    def __init__(self, config: ModelConfig, depth: int, quantize: bool) -> None:
        super().__init__(config, config.num_hidden_layers + depth, f"mtp.{depth}", quantize)
        self.ffn.ahead = depth + 1
        d, s = config.hidden_size, config.hc_mult
        self.e_proj = Linear(d, d, quantize)
        self.h_proj = Linear(d, d, quantize)
        self.enorm = RMSNorm(d, config.rms_norm_eps)
        self.hnorm = RMSNorm(d, config.rms_norm_eps)
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_parameters(config, s, 1)

    def fuse(self, embedding: Tensor, streams: Tensor) -> Tensor:
        """Add the next token's embedding [T, d] to the main model's streams [T, hc_mult, d], both projected."""
        fused = self.e_proj(self.enorm(embedding)).to(streams.dtype).unsqueeze(1)
        return fused + self.h_proj(self.hnorm(streams)).to(streams.dtype)
