"""Trace of one token through the layers: the keys that it attends to, with their weights, and the experts it runs.

The layers run as always, on the reference; hooks note the inputs of attention and the router's choice, and the
attention weights are computed again from what the cache then holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from dsv4.cache import Cache, LayerCache
from dsv4.config import COMPRESSION_KINDS, WINDOW
from dsv4.kernels.attention import EntryView, StoredRows, TileGroup
from dsv4.kernels.indexer import select_entries
from dsv4.model.attention import Attention
from dsv4.model.attention.attention import Rope
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import Block
from dsv4.model.layout import Layout
from dsv4.model.token_trace import EntryTrace, LayerTrace, TokenTrace
from dsv4.model.transformer import Transformer


@dataclass
class _Notes:
    """Inputs and outputs of one layer's parts."""

    x: Tensor = field(default_factory=lambda: torch.empty(0))  # [1, d], of attention
    layout: Layout | None = None
    rope: Rope | None = None
    cache: LayerCache | None = None
    routing: tuple[Tensor, ...] = ()  # weights [1, k], experts [1, k]


@torch.no_grad()  # stored weights cannot be viewed in inference mode
def trace_token(model: Transformer, cache: Cache, token_id: int, num_next: int = 5) -> TokenTrace:
    """Run one token as the next of row 0 of a cache that has no other rows in use, and trace it.

    Ends with the token in the cache. ValueError where the row has no room.
    """
    position = cache.lengths[0]
    batch = RaggedBatch.pack([[token_id]], starts=[position], device=model.device)
    cache.reserve(batch.slots, batch.starts, batch.lengths)
    backend = ReferenceBackend(model)
    with _noted(model) as notes:
        streams = backend.run(batch, cache)
    cache.advance(batch.slots, batch.lengths)
    layers = [_trace_layer(cast(Block, layer), note, position) for layer, note in zip(model.layers, notes, strict=True)]
    value, index = torch.softmax(backend.read_out(streams)[0], -1).topk(num_next)
    likely = list(zip(index.tolist(), value.tolist(), strict=True))
    return TokenTrace(position, layers, likely, cache.live_bytes(1))


@contextlib.contextmanager
def _noted(model: Transformer) -> Iterator[list[_Notes]]:
    """Notes of each main layer, filled by the next forward on the modules."""
    notes = [_Notes() for _ in model.layers]
    with contextlib.ExitStack() as hooks:
        for layer, note in zip(model.layers, notes, strict=True):
            block = cast(Block, layer)
            hooks.callback(block.attn.register_forward_hook(_attention_hook(note)).remove)
            hooks.callback(block.ffn.gate.register_forward_hook(_gate_hook(note)).remove)
        yield notes


def _attention_hook(note: _Notes) -> Any:
    def hook(module: Attention, inputs: tuple[Any, ...], output: Tensor) -> None:
        note.x, note.layout, note.rope, note.cache = inputs[:4]

    return hook


def _gate_hook(note: _Notes) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        note.routing = output[:2]

    return hook


def _trace_layer(block: Block, note: _Notes, position: int) -> LayerTrace:
    attn = block.attn
    layout, rope, cache = note.layout, note.rope, note.cache
    assert layout is not None and rope is not None and cache is not None
    q, q_latent = attn.queries(note.x, rope)
    start = max(0, position + 1 - WINDOW)
    seen = torch.arange(start, position + 1, device=q.device)
    window = StoredRows(cache.window[0], cache.format).take(seen % WINDOW)
    num_visible = (position + 1) // attn.ratio if attn.ratio else 0
    chosen, scores = _chosen_entries(attn, note, q_latent, num_visible)
    entries = window[:0]
    if cache.main is not None:
        pool = StoredRows(cache.main.entries, cache.main.format)
        entries = _entry_view(pool, attn, layout).of_sequence(0)[chosen]
    weights, sink = attention_weights(q[0], torch.cat((window.float(), entries.float())), attn.attn_sink)
    expert_weights, experts = note.routing
    of_entries = weights[len(seen) :].tolist()
    return LayerTrace(
        kind=COMPRESSION_KINDS[attn.ratio].name,
        window_start=start,
        window=weights[: len(seen)].tolist(),
        entries=[
            EntryTrace(entry, *covered(entry, attn.ratio), weight, scores[entry] if scores else None)
            for entry, weight in zip(chosen.tolist(), of_entries, strict=True)
        ],
        num_visible=num_visible,
        sink=sink,
        experts=experts[0].tolist(),
        expert_weights=expert_weights[0].tolist(),
        hashed=block.ffn.gate.tid2eid is not None,
    )


def attention_weights(q: Tensor, keys: Tensor, sink: Tensor) -> tuple[Tensor, float]:
    """(weights [n] of the keys, weight of the sink), means over heads, of one query: q [H, D], keys [n, D], sink [H].

    fp32; together they add up to 1.
    """
    scores = q.float() @ keys.float().mT * q.shape[-1] ** -0.5
    probs = torch.softmax(torch.cat((scores, sink.float().unsqueeze(-1)), -1), -1).mean(0)
    return probs[:-1], float(probs[-1])


def covered(entry: int, ratio: int) -> tuple[int, int]:
    """(first position, position behind the last) of the tokens that an entry is made of."""
    before = 1 if COMPRESSION_KINDS[ratio].overlap else 0
    return max(0, entry - before) * ratio, (entry + 1) * ratio


def _chosen_entries(
    attn: Attention, note: _Notes, q_latent: Tensor, num_visible: int
) -> tuple[Tensor, list[float] | None]:
    """(entries that the token reads [n], ascending; the indexer's scores of all visible ones, None if it chose none).

    The choice is made anew, by the model's own operation on the same tensors: it gives the same bits.
    """
    every = torch.arange(num_visible, device=q_latent.device)
    layout, rope, cache = note.layout, note.rope, note.cache
    assert layout is not None and rope is not None and cache is not None
    if attn.indexer is None or num_visible <= attn.indexer.top_k:
        return every, None
    assert cache.index is not None
    keys = _entry_view(StoredRows(cache.index.entries, cache.index.format), attn, layout)
    tiles = layout.tiles(attn.ratio, attn.indexer.top_k, attn.pair_budget)
    queries = attn.indexer.queries(note.x, q_latent, *rope.tokens)
    chosen, _ = select_entries(*queries, keys, tiles, attn.indexer.top_k)
    _, kept = select_entries(*queries, keys, tiles, attn.indexer.top_k, keep_scores=True)
    (group,) = cast("list[TileGroup]", tiles.groups)
    scores = kept[0]
    assert chosen is not None and scores is not None and group.sparse
    return chosen[0][chosen[0] >= 0], scores[0, 0, :num_visible].tolist()


def _entry_view(pool: StoredRows, attn: Attention, layout: Layout) -> EntryView:
    assert layout.cache is not None
    return EntryView(pool, attn.ratio, layout.batch, layout.cache.block_table)
