"""Size of an engine's cache: how many tokens it holds, in all and per request. Arithmetic only.

The cache's memory is handed out as it is written, so that a long limit costs nothing by itself. What memory could not
hold must not be promised: the pages are at most as many as fit beside the model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dsv4.analysis.kv import KvFormat
from dsv4.config import PAGE_TOKENS, ModelConfig
from dsv4.engine.capacity import cache_bytes_of
from dsv4.engine.config import EngineConfig
from dsv4.engine.machine import Memory

FREE_SHARE = 0.9  # of the memory that is left, for pages; the rest is for what a step needs
MIN_PAUSED = 8  # requests of a user that may wait to continue; more where there are more rows

logger = logging.getLogger("dsv4")


def most_paused(rows: int) -> int:
    """Requests of a user that may have given way at a time, whose copies take memory."""
    return max(MIN_PAUSED, rows)


@dataclass(frozen=True)
class CacheRoom:
    """Memory for pages, and bytes of a page over all layers (0: no layer has any)."""

    free: int
    page_bytes: int

    @property
    def num_pages(self) -> int:
        """Pages that fit, at least one."""
        return max(1, self.free // self.page_bytes) if self.page_bytes else 1 << 40


def room_for(
    config: ModelConfig, kv_format: KvFormat, rows: int, mapped: int, memory: Memory, streams: int = 0
) -> CacheRoom:
    """Room beside a loaded model. `mapped`: bytes of weights in mapped files, which the system keeps in memory where it
    can; where they exceed it they are read again and again, and leave the cache what it needs. `streams`: bytes per row
    that are kept for the MTP block.

    The state counts for each row, and for each request of a user that may have given way.
    """
    state, page = cache_bytes_of(config, kv_format)
    left = max(0, memory.available - (state + streams) * rows - state * most_paused(rows))
    return CacheRoom(int(FREE_SHARE * (left - mapped if mapped < left else left)), page)


@dataclass(frozen=True)
class CacheSize:
    """Tokens per request, pages of all requests, and requests at a time. `by_pages`: the pages bound a request."""

    max_model_len: int
    num_pages: int
    max_num_seqs: int
    by_pages: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests together."""
        return self.num_pages * PAGE_TOKENS

    def __str__(self) -> str:
        each = f"up to {self.max_model_len:,} each"
        return f"memory for {self.num_tokens:,} tokens: {self.max_num_seqs} requests at a time of {each}"


def cache_size(model: ModelConfig, config: EngineConfig, room: CacheRoom | None) -> CacheSize:
    """The size that is asked for, or by default the model's limit, as far as memory holds it.

    A limit that is given is kept, beyond the memory too. ValueError where it exceeds the model's, or that of the pages
    that are asked for: every request that is accepted can run alone.
    """
    limit, owner = model.max_position_embeddings, "the model's max_position_embeddings"
    asked, rows = config.num_pages, config.max_num_seqs
    if asked is not None and asked * PAGE_TOKENS < limit:
        limit, owner = asked * PAGE_TOKENS, f"the cache has num_pages = {asked} of {PAGE_TOKENS} tokens"
    length = config.max_model_len
    if length is not None and length > limit:
        raise ValueError(f"max_model_len is {length}; allowed: [2, {limit}] ({owner})")
    most = None if room is None or asked is not None else room.num_pages
    if length is None:
        length = limit if most is None else min(limit, most * PAGE_TOKENS)
        if room is not None and length < limit:
            logger.warning(
                "max_model_len is %d, the model's limit is %d: memory has room for no more (%.1f MB free,"
                " %.0f bytes per token)",
                *(length, limit, room.free / 1e6, room.page_bytes / PAGE_TOKENS),
            )
    full = -(-length // PAGE_TOKENS)
    pages = asked if asked is not None else rows * full if most is None else min(rows * full, max(most, full))
    return CacheSize(length, pages, rows, by_pages=pages * PAGE_TOKENS < model.max_position_embeddings)
