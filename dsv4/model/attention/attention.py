"""The attention layer: one path for training, prefill, decode and verification. Source: official inference model.py.

Shape letters: T tokens, G tiles, R query rows a tile, H heads, D head width, E entries, W window slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.cache import LayerCache
from dsv4.config import COMPRESSION_KINDS, ModelConfig
from dsv4.kernels.attention import attend
from dsv4.kernels.linear import linear
from dsv4.kernels.quant import fake_quant_fp8
from dsv4.model.attention.compressor import Compressor, store_entries
from dsv4.model.attention.indexer import Indexer, index_scores
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.gather import take_rows
from dsv4.model.layout import Layout, TileGroup
from dsv4.model.linear import Linear
from dsv4.model.norm import RMSNorm, rms_norm
from dsv4.model.rope import inverse_frequencies, rotate, rotation

PAIR_BUDGET = 1 << 23  # (query head row, key) pairs of one group: 32 MB of fp32 scores


class Attention(nn.Module):
    """Window attention, plus compressed entries where the layer's ratio is 4 (CSA) or 128 (HCA)."""

    def __init__(self, config: ModelConfig, ratio: int, quantize: bool) -> None:
        super().__init__()
        self.config, self.ratio, self.quantize = config, ratio, quantize
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

    def forward(self, x: Tensor, layout: Layout, rope: Rope, cache: LayerCache | None, aux: AuxLosses | None) -> Tensor:
        """x [T, d], normed layer input -> [T, d]. Appends to the cache when there is one."""
        H, D = self.config.num_attention_heads, self.config.head_dim
        cos, sin = rope.tokens
        q_latent = self.q_norm(self.wq_a(x))
        q = rms_norm(self.wq_b(q_latent).view(-1, H, D), self.config.rms_norm_eps)
        q = rotate(q, cos.unsqueeze(1), sin.unsqueeze(1))
        kv = self._quantize_kv(rotate(self.kv_norm(self.wkv(x)), cos, sin))
        window = self._window_keys(kv, layout, cache)
        o = self._attend(x, q, q_latent, window, layout, rope, cache, aux)
        if cache is not None:
            row, token = layout.ring_write
            cache.window.view(-1, D)[row] = kv.detach()[token].to(cache.window.dtype)
        return self._project(rotate(o, cos.unsqueeze(1), -sin.unsqueeze(1)))

    def _quantize_kv(self, kv: Tensor) -> Tensor:
        """Keys as the cache stores them: the channels without rotation in FP8, blocks of 64."""
        if not self.quantize:
            return kv
        nope = self.config.head_dim - self.config.qk_rope_head_dim
        return torch.cat((fake_quant_fp8(kv[..., :nope], 64), kv[..., nope:]), dim=-1)

    def _window_keys(self, kv: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """Rows that layout.window_index names: the rings of the sequences, the new tokens, one zero row."""
        parts = [kv, kv.new_zeros(1, kv.shape[1])]
        if cache is not None:
            parts.insert(0, cache.window[layout.slots].view(-1, kv.shape[1]).to(kv.dtype))
        return torch.cat(parts)

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        q_latent: Tensor,
        window: Tensor,
        layout: Layout,
        rope: Rope,
        cache: LayerCache | None,
        aux: AuxLosses | None,
    ) -> Tensor:
        entries = keys = index_q = index_w = None
        top_k = self.indexer.top_k if self.indexer is not None else 0
        # The widest tensor of a group has max(H, indexer heads) rows a token.
        heads = max(q.shape[1], self.config.index_n_heads if top_k else 0)
        groups = layout.groups(self.ratio, top_k, PAIR_BUDGET // heads)
        if self.compressor is not None:
            made = self.compressor(x, layout, cache.main if cache else None, rope.inv_freq, rope.entries)
            made = self._quantize_kv(made) if made is not None else None
            entries = store_entries(made, layout, self.ratio, cache.main if cache else None, x, q.shape[2])
        if self.indexer is not None:
            # The indexer learns from its own loss only, and the backbone never through it.
            xi, qi = x.detach(), q_latent.detach()
            needed = aux is not None or any(g.sparse for g in groups)
            if cache is not None or needed:
                made = self.indexer.compressor(xi, layout, cache.index if cache else None, rope.inv_freq, rope.entries)
                made = self.indexer.rotate_and_quantize(made) if made is not None else None
                keys = store_entries(made, layout, self.ratio, cache.index if cache else None, x, self.indexer.width)
            if needed:
                index_q, index_w = self.indexer.queries(xi, qi, *rope.tokens)
        outputs: list[Tensor] = []
        losses: list[Tensor] = []
        for group in groups:
            out, loss = self._attend_group(q, window, entries, keys, index_q, index_w, layout, group, aux is not None)
            outputs.append(out)
            losses.extend(loss)
        if aux is not None and losses:
            aux.add_indexer(torch.cat(losses).sum() / max(1, layout.count_from(self.ratio - 1)))
        o = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return layout.token_rows(o)

    def _attend_group(
        self,
        q: Tensor,
        window: Tensor,
        entries: Tensor | None,
        keys: Tensor | None,
        index_q: Tensor | None,
        index_w: Tensor | None,
        layout: Layout,
        group: TileGroup,
        want_loss: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output [G, R, H, D] of a group of tiles, and the indexer's KL of each row where one is wanted."""
        tiles = slice(group.first, group.last)
        seen = slice(group.window_skip, None)
        keys_w = take_rows(window, layout.window_index[tiles, seen])
        args = (layout.tile_rows(q, tiles), keys_w, layout.window_mask[tiles, :, seen], self.attn_sink)
        if group.num_entries == 0 or entries is None:
            return attend(*args)[0], []
        mask = torch.arange(group.num_entries, device=q.device) < group.num_visible.unsqueeze(-1)
        scores = None
        if index_q is not None and index_w is not None and keys is not None and (group.sparse or want_loss):
            scores = index_scores(
                layout.tile_rows(index_q, tiles), layout.tile_rows(index_w, tiles), pick(keys, group.entries)
            )
        if group.sparse:
            assert self.indexer is not None and scores is not None
            chosen = self.indexer.select(scores.detach(), group.num_visible)
            mask, chosen = chosen >= 0, chosen.clamp(min=0)
            scores = scores.gather(-1, chosen.clamp(max=scores.shape[-1] - 1))
            picked = self._gather(entries, group, chosen)
        else:
            picked = pick(entries, group.entries)
        loss = want_loss and scores is not None
        out, probs = attend(*args, picked, mask, return_entry_probs=loss)
        if not loss:
            return out, []
        assert probs is not None and scores is not None
        return out, [indexer_kl(probs.detach(), scores, mask).flatten()]

    def _gather(self, entries: Tensor, group: TileGroup, chosen: Tensor) -> Tensor:
        """Entries [G, R, k, D] that each row chose by its number within the sequence, chosen [G, R, k]."""
        if isinstance(group.entries, slice):
            return take_rows(entries, chosen + group.entries.start)
        assert group.entries is not None
        if group.entries.dim() == 1:
            return take_rows(entries, group.entries[chosen])
        tile = torch.arange(chosen.shape[0], device=chosen.device)[:, None, None]
        return take_rows(entries, group.entries[tile, chosen])

    def _project(self, o: Tensor) -> Tensor:
        """o [T, H, D] -> [T, d]: each group of heads to its own o_lora_rank channels, then all to the hidden size."""
        groups, rank = self.config.o_groups, self.config.o_lora_rank
        weight = self.wo_a.weight.view(groups, rank, -1)
        parts = [linear(part.flatten(1), w) for part, w in zip(o.chunk(groups, 1), weight, strict=True)]
        return self.wo_b(torch.cat(parts, dim=-1))


def pick(entries: Tensor, rows: slice | Tensor | None) -> Tensor:
    """Rows of the entry tensor that a group reads: [E, D] where its tiles share them, else [G, E, D]."""
    assert rows is not None
    return entries[rows] if isinstance(rows, slice) else take_rows(entries, rows)


def indexer_kl(probs: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """KL(attention over the entries, heads summed and renormalised || softmax of the index scores), [G, R].

    probs, scores fp32 [G, R, E]; rows that see no entry give 0. Source: DeepSeek-V3.2 report, indexer warm-up.
    """
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)
    log_q = torch.log_softmax(scores.masked_fill(~mask, -1e30), dim=-1)
    terms = probs * (probs.clamp(min=1e-20).log() - log_q)
    return terms.masked_fill(~mask, 0.0).sum(-1)


class Rope:
    """Rotations of one forward for layers of one kind: of tokens, and of entries by ratio (filled on first use)."""

    def __init__(self, config: ModelConfig, compressed: bool, layout: Layout) -> None:
        self.inv_freq = inverse_frequencies(config, compressed).to(layout.device)
        self.tokens = rotation(self.inv_freq, layout.positions)
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}
