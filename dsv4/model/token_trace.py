"""TokenTrace: what one token attends to in each layer, and its experts. No torch; `trace.py` computes it."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.config import LayerKind


@dataclass(frozen=True)
class EntryTrace:
    """A compressed entry that a token reads."""

    index: int  # number within its sequence
    start: int  # position of the first token that it covers
    stop: int  # position behind the last
    weight: float  # attention weight, mean over heads
    score: float | None  # of the indexer; None where there is none, or where it did not choose


@dataclass(frozen=True)
class LayerTrace:
    """One layer's part of a trace. Attention weights are means over heads; window, entries and sink add up to 1."""

    kind: LayerKind
    window_start: int  # position of the first window token; the last is the token itself
    window: list[float]  # weights, by position
    entries: list[EntryTrace]  # ascending
    num_visible: int  # entries that the token may see; with an indexer it reads at most index_topk of them
    sink: float  # weight of the sink, which adds nothing
    experts: list[int]  # in the router's order
    expert_weights: list[float]
    hashed: bool  # experts chosen by token id


@dataclass(frozen=True)
class TokenTrace:
    """Trace of the token at `position`, all layers, and the tokens that it makes likely."""

    position: int
    layers: list[LayerTrace]
    next_tokens: list[tuple[int, float]]  # (token id, probability), likeliest first
    cache_bytes: dict[str, int]  # of the sequence up to and with this token, as Cache.live_bytes
