"""The model: embedding, blocks with mHC around attention and experts, read-out, MTP block. Official parameter names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dsv4.cache import Cache, LayerCache
from dsv4.config import WINDOW, ModelConfig
from dsv4.kernels import native as native_kernels
from dsv4.kernels.stored import StoredTensor
from dsv4.model.attention import Attention
from dsv4.model.attention.attention import Rope
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.hyper_connections import hc_head, hc_post, hc_pre
from dsv4.model.initialization import init_weights
from dsv4.model.layout import Layout
from dsv4.model.linear import Linear, linear_fp32
from dsv4.model.moe import MoE
from dsv4.model.native_backend import NativeForward, wants_gradient
from dsv4.model.norm import RMSNorm

NUMERICS = ("float", "shipped")


class ForwardContext:
    """What all layers of one forward share: index tables, rotations, token ids, cache, auxiliary losses."""

    def __init__(
        self, config: ModelConfig, batch: RaggedBatch, cache: Cache | None, aux: AuxLosses | None, device: torch.device
    ) -> None:
        self.config, self.cache, self.aux = config, cache, aux
        self.token_ids = batch.token_ids.to(device)
        self.layout = Layout(batch, cache, device)
        self._rope: dict[bool, Rope] = {}

    def rope(self, ratio: int) -> Rope:
        """Rotations of a layer with this ratio; ratio 0 has frequencies of its own."""
        if bool(ratio) not in self._rope:
            self._rope[bool(ratio)] = Rope(self.config, bool(ratio), self.layout)
        return self._rope[bool(ratio)]

    def layer_cache(self, index: int) -> LayerCache | None:
        return self.cache.layers[index] if self.cache is not None else None


def _recorded(streams: Tensor) -> bool:
    """Whether a gradient is wanted of streams that a caller made."""
    return torch.is_grad_enabled() and streams.requires_grad


def _hc_parameters(config: ModelConfig, mixes: int, scales: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """fn [mixes, s * d], base [mixes] and scale [scales] of one mHC site, uninitialised."""
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
        self.attn = Attention(config, self.ratio, quantize)
        self.ffn = MoE(config, f"{name}.ffn", index < config.num_hash_layers, quantize)
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(d, config.rms_norm_eps)
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = _hc_parameters(config, s * (2 + s), 3)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = _hc_parameters(config, s * (2 + s), 3)

    def forward(self, streams: Tensor, ctx: ForwardContext) -> Tensor:
        """streams [T, hc_mult, d] -> the same shape."""
        c = self.config
        x, post, comb = hc_pre(streams, self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base, c)
        y = self.attn(self.attn_norm(x), ctx.layout, ctx.rope(self.ratio), ctx.layer_cache(self.index), ctx.aux)
        streams = hc_post(y, streams, post, comb)
        x, post, comb = hc_pre(streams, self.hc_ffn_fn, self.hc_ffn_scale, self.hc_ffn_base, c)
        y = self.ffn(self.ffn_norm(x), ctx.token_ids, ctx.layout, ctx.aux)
        return hc_post(y, streams, post, comb)


class MTPBlock(Block):
    """Multi-token prediction: the next token's embedding joins every stream, then one block and its own read-out."""

    def __init__(self, config: ModelConfig, depth: int, quantize: bool) -> None:
        super().__init__(config, config.num_hidden_layers + depth, f"mtp.{depth}", quantize)
        d, s = config.hidden_size, config.hc_mult
        self.e_proj = Linear(d, d, quantize)
        self.h_proj = Linear(d, d, quantize)
        self.enorm = RMSNorm(d, config.rms_norm_eps)
        self.hnorm = RMSNorm(d, config.rms_norm_eps)
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = _hc_parameters(config, s, 1)

    def fuse(self, embedding: Tensor, streams: Tensor) -> Tensor:
        """Embedding [T, d] of the next token into streams [T, hc_mult, d] of the main model."""
        # Under autocast both products are bfloat16, while streams stay as they are.
        fused = self.e_proj(self.enorm(embedding)).to(streams.dtype).unsqueeze(1)
        return fused + self.h_proj(self.hnorm(streams)).to(streams.dtype)


class Transformer(nn.Module):
    """DeepSeek V4. numerics: "float" (no fake quantisation) or "shipped" (FP8 KV and activations, FP4 indexer)."""

    def __init__(self, config: ModelConfig, numerics: str = "float") -> None:
        super().__init__()
        if numerics not in NUMERICS:
            raise ValueError(f"numerics {numerics!r}: allowed are {', '.join(NUMERICS)}")
        if config.sliding_window != WINDOW:
            raise ValueError(
                f"sliding_window {config.sliding_window}: this implementation has windows of {WINDOW} tokens"
            )
        quantize = numerics == "shipped"
        width = config.index_head_dim
        if quantize and config.has_indexer and width & (width - 1):
            raise ValueError(
                f"index_head_dim {width}: shipped numerics rotate it by Hadamard, which needs a power of two"
            )
        self.config, self.numerics = config, numerics
        d, s = config.hidden_size, config.hc_mult
        self.embed = nn.Embedding(config.vocab_size, d, _weight=torch.empty(config.vocab_size, d))
        self.layers = nn.ModuleList(Block(config, i, f"layers.{i}", quantize) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.head = Linear(d, config.vocab_size)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = _hc_parameters(config, s, 1)
        self.mtp = nn.ModuleList(MTPBlock(config, i, quantize) for i in range(config.num_nextn_predict_layers))
        self._native: NativeForward | None = None

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters for training from scratch."""
        init_weights(self, self.config, generator)

    def requires_grad_(self, requires_grad: bool = True) -> Transformer:
        """As of any module; weights that stay as they are stored become float32 first, since they take no gradient."""
        if requires_grad:
            self.widen()
        return super().requires_grad_(requires_grad)

    def widen(self) -> Transformer:
        """Turn weights that stay as they are stored into float32 parameters. Returns self."""
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, StoredTensor):
                    setattr(module, name, nn.Parameter(parameter.widen(), requires_grad=False))
        return self

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def new_cache(self, batch_size: int = 1, max_tokens: int = 4096) -> Cache:
        """An empty cache of `batch_size` sequences of up to `max_tokens` tokens; memory is taken as it fills (CPU)."""
        return Cache(self.config, batch_size, max_tokens, self.device, self.dtype)

    def _native_forward(self, tokens: int) -> NativeForward | None:
        """The native kernels with this model's tensors, None where the plain torch path runs."""
        kernels = native_kernels.module()
        if kernels is None:
            return None
        if self._native is None and (self.device.type != "cpu" or self.dtype != torch.float32):
            return None  # before a walk over the parameters
        if wants_gradient(self):
            return None
        if self._native is None or self._native.kernels is not kernels or not self._native.is_current(tokens):
            self._native = NativeForward(kernels, self) if NativeForward.takes(self) else None
        return self._native

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """As of any module: what moves or converts every tensor."""
        self._native = None  # torch may put new tensors in the old ones' place, which the old ones do not show
        return super()._apply(fn, recurse)

    def _in_cache(self, batch: RaggedBatch, cache: Cache | None) -> tuple[RaggedBatch, Cache]:
        """For the native kernels: without a cache, one that lives as long as the call."""
        if cache is not None:
            return batch, cache
        cache = self.new_cache(batch.num_seqs, int(batch.lengths.max()))
        batch = replace(batch, starts=np.zeros_like(batch.starts), slots=np.arange(batch.num_seqs))
        cache.reserve(batch.slots, batch.starts, batch.lengths)
        return batch, cache

    def forward_ragged(self, batch: RaggedBatch, cache: Cache | None = None, aux: AuxLosses | None = None) -> Tensor:
        """Streams [T, hc_mult, d] after the last main layer. With a cache, appends to the rows that batch.slots names.

        Sequence i must start where its cache row ends, and no row may be named twice; ValueError otherwise, before
        anything is written.
        """
        if cache is not None:
            cache.reserve(batch.slots, batch.starts, batch.lengths)
        native = self._native_forward(batch.num_tokens) if aux is None else None
        if native is not None:
            layers = range(self.config.num_hidden_layers)
            streams = native.forward(*self._in_cache(batch, cache), batch.token_ids, layers, None)
        else:
            ctx = ForwardContext(self.config, batch, cache, aux, self.device)
            streams = self.embed(ctx.token_ids).unsqueeze(1).expand(-1, self.config.hc_mult, -1)
            for layer in self.layers:
                streams = layer(streams, ctx)
        if cache is not None:
            cache.advance(batch.slots, batch.lengths)
        return streams

    def next_token_logits(
        self, batch: RaggedBatch, cache: Cache | None = None, rows: np.ndarray | None = None
    ) -> Tensor:
        """Logits fp32 [n, vocab] after the batch's tokens `rows`, int64 [n] ascending; None: after every token.

        The bits of `logits(forward_ragged(batch, cache)[rows])`, in one call of the native kernels: an engine's step.
        ValueError, before anything is written, as of `forward_ragged`, and where rows do not ascend or are none.
        """
        before = -1
        for i, row in enumerate(() if rows is None else rows.tolist()):
            if not before < row < batch.num_tokens:
                allowed = f"0 to {batch.num_tokens - 1}, each more than the one before"
                raise ValueError(f"rows[{i}] is {row}: allowed are {allowed}")
            before = row
        native = self._native_forward(batch.num_tokens)
        if native is None:
            streams = self.forward_ragged(batch, cache)
            return self.logits(streams if rows is None else streams[torch.from_numpy(rows).to(streams.device)])
        if cache is not None:
            cache.reserve(batch.slots, batch.starts, batch.lengths)
        rows = np.arange(batch.num_tokens) if rows is None else rows
        logits = native.next_token_logits(*self._in_cache(batch, cache), rows)
        if cache is not None:
            cache.advance(batch.slots, batch.lengths)
        return logits

    def logits(self, streams: Tensor) -> Tensor:
        """Next-token logits, fp32 [n, vocab], of streams [n, hc_mult, d]."""
        native = self._native_forward(streams.shape[0]) if not _recorded(streams) else None
        if native is not None:
            return native.head(streams)
        x = hc_head(streams, self.hc_head_fn, self.hc_head_scale, self.hc_head_base, self.config)
        return linear_fp32(self.norm(x.float()), self.head.weight)

    def mtp_forward(
        self,
        streams: Tensor,
        next_token_ids: Tensor,
        batch: RaggedBatch,
        cache: Cache | None = None,
        aux: AuxLosses | None = None,
        depth: int = 0,
    ) -> Tensor:
        """Streams of the MTP block: main streams at t and the id at t + 1 [T] -> streams that predict t + 2.

        With a cache, batch is the one just forwarded through the main layers (its starts are used, not cache.lengths).
        """
        if cache is not None:
            cache.check_slots(batch.slots.tolist())
        block = cast(MTPBlock, self.mtp[depth])
        native = self._native_forward(batch.num_tokens) if aux is None and not _recorded(streams) else None
        if native is not None:
            fused, index = block.fuse(self.embed(next_token_ids), streams), self.config.num_hidden_layers + depth
            return native.forward(*self._in_cache(batch, cache), next_token_ids, range(index, index + 1), fused)
        ctx = ForwardContext(self.config, batch, cache, aux, self.device)
        ctx.token_ids = next_token_ids
        return block(block.fuse(self.embed(next_token_ids), streams), ctx)

    def mtp_logits(self, streams: Tensor, depth: int = 0) -> Tensor:
        """Logits for t + 2, fp32 [n, vocab], of MTP streams [n, hc_mult, d]; the head is the main model's."""
        native = self._native_forward(streams.shape[0]) if not _recorded(streams) else None
        if native is not None:
            return native.head(streams, f"mtp.{depth}.")
        block = cast(MTPBlock, self.mtp[depth])
        x = hc_head(streams, block.hc_head_fn, block.hc_head_scale, block.hc_head_base, self.config)
        return linear_fp32(block.norm(x.float()), self.head.weight)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Padded call: input_ids int64 [B, S], no padding among them -> logits fp32 [B, S, vocab].

        With a cache, row b continues cache row b; any split of a sequence into calls gives the same logits.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be [batch, at least one token], got {tuple(input_ids.shape)}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high}: allowed are 0 to {self.config.vocab_size - 1}")
        if cache is not None and input_ids.shape[0] != cache.batch_size:
            raise ValueError(f"input_ids has {input_ids.shape[0]} rows, the cache {cache.batch_size}")
        starts = cache.lengths if cache is not None else None
        batch = RaggedBatch.pack(input_ids.tolist(), starts=starts, device=self.device)
        return self.next_token_logits(batch, cache).view(*input_ids.shape, -1)
