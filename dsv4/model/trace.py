"""Trace of one token through the layers: the keys that it attends to, with their weights, and the experts it runs.

The layers run as always, on the reference; attention and router are watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.config import COMPRESSION_KINDS, WINDOW
from dsv4.model.attention.attention import Attended, Attention
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import Block
from dsv4.model.token_trace import EntryTrace, LayerTrace, TokenTrace
from dsv4.model.transformer import Transformer


@dataclass
class _Notes:
    """Of one layer."""

    attended: Attended | None = None
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
            hooks.enter_context(_watched(block.attn, note))
            hooks.callback(block.ffn.gate.register_forward_hook(_gate_hook(note)).remove)
        yield notes


@contextlib.contextmanager
def _watched(attn: Attention, note: _Notes) -> Iterator[None]:
    def take(attended: Attended) -> None:
        note.attended = attended

    attn.watcher = take
    try:
        yield
    finally:
        attn.watcher = None


def _gate_hook(note: _Notes) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        note.routing = output[:2]

    return hook


def _trace_layer(block: Block, note: _Notes, position: int) -> LayerTrace:
    attn, seen = block.attn, note.attended
    assert seen is not None and seen.tiles.row_token.numel() == 1, "one token has one row of one tile"
    (group,), (probabilities,) = seen.tiles.groups, seen.probabilities
    heads = attn.config.num_attention_heads
    in_window = seen.tiles.window_mask[0, 0, group.window_skip :]
    expert_weights, experts = note.routing
    num_visible = (position + 1) // attn.ratio if attn.ratio else 0
    return LayerTrace(
        kind=COMPRESSION_KINDS[attn.ratio].name,
        window_start=max(0, position + 1 - WINDOW),
        window=(probabilities.window()[0, 0][in_window] / heads).tolist(),
        entries=_trace_entries(attn, seen, probabilities.entries(), num_visible),
        num_visible=num_visible,
        sink=float(probabilities.sink()) / heads,
        experts=experts[0].tolist(),
        expert_weights=expert_weights[0].tolist(),
        hashed=block.ffn.gate.tid2eid is not None,
    )


def _trace_entries(attn: Attention, seen: Attended, probabilities: Tensor | None, num_visible: int) -> list[EntryTrace]:
    """The entries that the token reads, ascending, with the indexer's scores where it had to choose.

    probabilities [1, 1, n], summed over heads, of those that its tile group reads.
    """
    if probabilities is None:
        return []
    (group,) = seen.tiles.groups
    mask, numbers = group.visible(seen.tiles.rows(seen.chosen, group) if seen.chosen is not None else None)
    mask = mask[0, 0]
    entries = mask.nonzero().flatten() if numbers is None else numbers[0, 0][mask]
    weights = (probabilities[0, 0][mask] / attn.config.num_attention_heads).tolist()
    scores: list[float | None] = [None] * len(weights)
    if group.sparse and num_visible > attn.config.index_topk:
        (every,) = seen.scores
        assert every is not None, "a watched indexer keeps its scores"
        scores = every[0, 0][entries].tolist()
    return [
        EntryTrace(entry, *covered(entry, attn.ratio), weight, score)
        for entry, weight, score in zip(entries.tolist(), weights, scores, strict=True)
    ]


def covered(entry: int, ratio: int) -> tuple[int, int]:
    """(first position, position behind the last) of the tokens that an entry is made of."""
    before = 1 if COMPRESSION_KINDS[ratio].overlap else 0
    return max(0, entry - before) * ratio, (entry + 1) * ratio
