"""The model and the cache as the engine needs them; `dsv4.model.transformer.Transformer` and its cache are ones."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.model.batch import RaggedBatch


class EngineCache(Protocol):
    """A cache of rows, one per running request."""

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        ...

    def reset(self, slot: int, /) -> None:
        """Empties a row."""
        ...


@runtime_checkable
class TruncatableCache(EngineCache, Protocol):
    """A cache that can take back the last tokens of a row, as rejected drafts need."""

    def expect_drafts(self, slot: int, start: int, count: int, /) -> None:
        """Before a forward whose tokens of a row from position `start` on, `count` of them, may be taken back."""
        ...

    def truncate(self, slot: int, length: int, /) -> None:
        """Lets a row hold its first `length` tokens alone."""
        ...


class EngineModel(Protocol):
    """A model that continues the cache rows of a ragged batch."""

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self, batch_size: int, max_tokens: int) -> EngineCache: ...

    # The cache is one that new_cache made: to the engine it is opaque but for EngineCache.
    def next_token_logits(self, batch: RaggedBatch, cache: Any, rows: np.ndarray) -> Tensor:
        """Logits fp32 [n, vocab] after the batch's tokens `rows`, int64 [n] ascending; n may be 0."""
        ...


@runtime_checkable
class StreamingModel(EngineModel, Protocol):
    """A model that gives the streams as well, from which MTP blocks draft."""

    def next_token_logits_and_streams(self, batch: RaggedBatch, cache: Any, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """As next_token_logits, and the streams [T, hc_mult, d] of all tokens of the batch."""
        ...


@runtime_checkable
class DraftingModel(StreamingModel, Protocol):
    """A model with an MTP block; see `dsv4.model.transformer.Transformer`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the streams."""
        ...

    def mtp_forward(self, streams: Tensor, next_token_ids: Tensor, batch: RaggedBatch, cache: Any) -> Tensor: ...

    def mtp_logits(self, streams: Tensor) -> Tensor: ...
