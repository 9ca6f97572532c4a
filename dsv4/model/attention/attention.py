"""The attention layer: one path for training, prefill, decode and verification. Source: official inference model.py.

Shape letters: T tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsv4.analysis.kv import KV_BLOCK
from dsv4.cache import LayerCache
from dsv4.config import COMPRESSION_KINDS, WINDOW, ModelConfig
from dsv4.kernels.attention import EntryView, KeyView, Probabilities, StoredRows, Tiles, attend, attend_watched
from dsv4.kernels.index_loss import index_loss
from dsv4.kernels.indexer import select_entries
from dsv4.kernels.linear import linear
from dsv4.kernels.norm import rms_norm
from dsv4.kernels.quant import fake_quant_bf16, fake_quant_fp8
from dsv4.kernels.rope import rotate, rotation
from dsv4.model.attention.compressor import Compressor, store_entries
from dsv4.model.attention.indexer import Indexer
from dsv4.model.aux_losses import AuxLosses, count_differences
from dsv4.model.layout import Layout
from dsv4.model.linear import Linear
from dsv4.model.norm import RMSNorm
from dsv4.model.recomputed import Kept, Recomputed, recomputed
from dsv4.model.rope import inverse_frequencies

PAIR_BUDGET = 1 << 23  # (query head row, key) pairs of one group: 32 MB of fp32 scores


@dataclass(frozen=True)
class Attended:
    """One forward of a layer: the entries chosen (kernels/indexer), scores and probabilities per tile group."""

    tiles: Tiles
    chosen: Tensor | None
    scores: list[Tensor | None]  # of the indexer; empty in a layer without one
    probabilities: list[Probabilities]


class Attention(nn.Module):
    """Window attention, plus compressed entries where the layer's ratio is 4 (CSA) or 128 (HCA)."""

    def __init__(self, config: ModelConfig, name: str, ratio: int, quantize: bool) -> None:
        super().__init__()
        self.config, self.name, self.ratio, self.quantize = config, name, ratio, quantize
        d, H, D, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.attn_sink = nn.Parameter(torch.empty(H))
        self.wq_a = Linear(d, rank, quantize)
        self.q_norm = RMSNorm(rank, config.rms_norm_eps)
        self.wq_b = Linear(rank, H * D, quantize)
        self.wkv = Linear(d, D, quantize)
        self.kv_norm = RMSNorm(D, config.rms_norm_eps)
        self.wo_a = Linear(H * D // config.o_groups, config.o_groups * config.o_lora_rank)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, d, quantize)
        self.compressor = Compressor(config, D, ratio) if ratio else None
        self.indexer = Indexer(config, quantize) if COMPRESSION_KINDS[ratio].has_indexer else None
        self.watcher: Callable[[Attended], None] | None = None  # told of each forward, which keeps what it computes
        self.choice_watcher: Callable[[Tensor | None], None] | None = None  # told of the entries that are chosen

    def forward(self, x: Tensor, layout: Layout, rope: Rope, cache: LayerCache | None, aux: AuxLosses | None) -> Tensor:
        """Normed layer input x [T, d] -> [T, d]. Appends to the cache, if given."""
        cos, sin = rope.tokens
        q, q_latent, between = self.queries(x, rope)
        kv = self._quantize_kv(rotate(self.kv_norm(self.wkv(x)), cos, sin))
        if cache is not None:
            kv = cache.format.round(kv)
        ring = StoredRows(cache.window, cache.format) if cache is not None else None
        if layout.batch.part is not None:
            ring = StoredRows(layout.batch.part.earlier(WINDOW, kv)[0])
        keys = KeyView(kv, layout.batch, ring, layout.slots, None)
        with between.unkept():
            o = self._attend(x, q, q_latent, keys, layout, rope, cache, aux)
        if cache is not None:
            row, token = layout.ring_write
            cache.write_window(row, kv.detach()[token])
        return self._project(rotate(o, cos.unsqueeze(1), -sin.unsqueeze(1)))

    def queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Recomputed | Kept]:
        """(rotated queries [T, H, D], what they and the indexer's are made of [T, q_lora_rank], how q is kept)."""
        H, D = self.config.num_attention_heads, self.config.head_dim
        cos, sin = rope.tokens
        q_latent = self.q_norm(self.wq_a(x))
        raw = self.wq_b(q_latent).view(-1, H, D)

        def rotated(raw: Tensor) -> Tensor:
            return rotate(rms_norm(raw, self.config.rms_norm_eps), cos.unsqueeze(1), sin.unsqueeze(1))

        q = rotated(raw)
        return q, q_latent, recomputed(q, rotated, raw)  # the norm keeps raw

    @property
    def _learns(self) -> bool:
        return self.indexer is not None and self.indexer.learns

    @property
    def pair_budget(self) -> int:
        """Most (query, key) pairs of a tile group, whose widest tensor has max(H, indexer heads) rows per token."""
        heads = max(self.config.num_attention_heads, self.config.index_n_heads if self.indexer is not None else 0)
        return PAIR_BUDGET // heads

    def _quantize_kv(self, kv: Tensor) -> Tensor:
        """Keys as the published model stores them: in shipped numerics, FP8, and BF16 in the rotated channels."""
        if not self.quantize:
            return kv
        nope = self.config.head_dim - self.config.qk_rope_head_dim
        return torch.cat((fake_quant_fp8(kv[..., :nope], KV_BLOCK), fake_quant_bf16(kv[..., nope:])), dim=-1)

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        q_latent: Tensor,
        keys: KeyView,
        layout: Layout,
        rope: Rope,
        cache: LayerCache | None,
        aux: AuxLosses | None,
    ) -> Tensor:
        """Attention output o [T, H, D] of the rotated queries q [T, H, D]."""
        top_k = self.indexer.top_k if self.indexer is not None else 0
        tiles = layout.tiles(self.ratio, top_k, self.pair_budget)
        if self.compressor is not None:
            made = self.compressor(x, layout, cache.main if cache else None, rope.inv_freq, rope.entries)
            made = self._quantize_kv(made) if made is not None else None
            entries = store_entries(made, layout, self.ratio, cache.main if cache else None, x, q.shape[2])
            keys = replace(keys, entries=entries)
        part, learning = layout.batch.part, aux is not None and self._learns
        learns = learning and any(group.num_entries for group in tiles.groups)
        watcher = self.watcher
        # All processes that hold parts of a batch exchange index keys if one of them may need them.
        wanted = learns or watcher is not None or (part is not None and (learning or top_k > 0))
        index = self._index(x, q_latent, tiles, layout, rope, cache, wanted)
        chosen, scores = None, []
        if index is not None and top_k:
            chosen, scores = self._select(index, tiles, layout, top_k, aux, watcher is not None)
            if self.choice_watcher is not None:
                self.choice_watcher(chosen)
        if watcher is not None:
            assert not learns, "a watched layer does not learn"
            o, seen = attend_watched(q, keys, tiles, self.attn_sink, chosen)
            watcher(Attended(tiles, chosen, scores, seen))
            return o
        o, probs = attend(q, keys, tiles, self.attn_sink, chosen, keep_probs=learns)
        loss = None
        if index is not None and probs is not None:
            loss = index_loss(*index, tiles, chosen, probs) / max(1, layout.count_from(self.ratio - 1))
        if part is not None:
            o = part.tie(o, keys.entries.pool.rows) if keys.entries is not None else o
            if learning and index is not None:
                loss = part.tie(torch.zeros((), device=o.device) if loss is None else loss, index[2].pool.rows)
        if aux is not None and loss is not None:
            aux.add_indexer(loss)
        return o

    def _index(
        self,
        x: Tensor,
        q_latent: Tensor,
        tiles: Tiles,
        layout: Layout,
        rope: Rope,
        cache: LayerCache | None,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, EntryView] | None:
        """(the indexer's queries, their weights, its keys), or None if it has no choice to make and is not `wanted`.

        Inputs are detached: the indexer learns from its own loss only, and the backbone never through the indexer.
        """
        needed = wanted or any(group.sparse for group in tiles.groups)
        if self.indexer is None or not (needed or cache is not None):
            return None
        x, q_latent, state = x.detach(), q_latent.detach(), cache.index if cache else None
        made = self.indexer.compressor(x, layout, state, rope.inv_freq, rope.entries)
        made = self.indexer.rotate_and_quantize(made) if made is not None else None
        keys = store_entries(made, layout, self.ratio, state, x, self.indexer.width)
        return (*self.indexer.queries(x, q_latent, *rope.tokens), keys) if needed else None

    def _select(
        self,
        index: tuple[Tensor, Tensor, EntryView],
        tiles: Tiles,
        layout: Layout,
        top_k: int,
        aux: AuxLosses | None,
        watched: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """As select_entries; the entries that `aux` has for this layer stand in place of the indexer's choice."""
        given = aux.entries.get(self.name) if aux is not None else None
        if aux is None or given is None or watched:
            return select_entries(*index, tiles, top_k, watched)
        if not any(group.sparse for group in tiles.groups):
            return None, []
        free = (given[:, 0] < 0) & ((layout.positions + 1) // self.ratio > top_k)
        if aux.compare or bool(free.any()):
            own, _ = select_entries(*index, tiles, top_k)
            assert own is not None, "sparse tiles have a choice"
            if aux.compare:
                aux.entry_differences += count_differences(given, own)
            given = torch.where(free.unsqueeze(1), own, given)
        return given, []

    def _project(self, o: Tensor) -> Tensor:
        """o [T, H, D] -> [T, d]: each group of heads to its own o_lora_rank channels, then all to the hidden size."""
        groups, rank = self.config.o_groups, self.config.o_lora_rank
        weight = self.wo_a.weight.view(groups, rank, -1)
        parts = [linear(part.flatten(1), w) for part, w in zip(o.chunk(groups, 1), weight, strict=True)]
        return self.wo_b(torch.cat(parts, dim=-1))


class Rope:
    """Rotations of one forward for layers of one kind: for tokens, and for entries by ratio (filled on first use)."""

    def __init__(self, config: ModelConfig, compressed: bool, layout: Layout) -> None:
        self.inv_freq = inverse_frequencies(config, compressed).to(layout.device)
        self.tokens = rotation(self.inv_freq, layout.positions)
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}
