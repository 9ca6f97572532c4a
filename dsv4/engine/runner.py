"""ModelRunner: owns the model and its cache; turns scheduled chunks into logits in one ragged forward."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.engine.scheduler import ScheduledChunk
from dsv4.model.batch import RaggedBatch


class EngineModel(Protocol):
    """What the engine needs of a model; `dsv4.model.transformer.Transformer` is one.

    The cache is the model's own: `reset(row)` empties a row, `next_token_logits` continues those of the batch's slots.
    """

    @property
    def config(self) -> ModelConfig: ...

    def next_token_logits(self, batch: RaggedBatch, cache: Any, rows: np.ndarray) -> Tensor: ...

    def new_cache(self, batch_size: int, max_tokens: int) -> Any: ...


class ModelRunner:
    """Runs steps on one device. The cache has one row for each request that may run."""

    def __init__(self, model: EngineModel, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.cache = model.new_cache(batch_size=max_num_seqs, max_tokens=max_model_len)

    @torch.inference_mode()
    def run(self, chunks: list[ScheduledChunk]) -> Tensor | None:
        """fp32 [n, vocab] logits of the chunks that sample, in their order; None when no chunk does.

        Each chunk continues its request's cache row, which afterwards holds everything up to chunk.stop.
        """
        batch = RaggedBatch.pack(
            [chunk.request.tokens(chunk.start, chunk.stop) for chunk in chunks],
            starts=[chunk.start for chunk in chunks],
            slots=[chunk.request.slot for chunk in chunks],
            device=self.device,
        )
        last_rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.stop - chunk.start
            if chunk.samples:
                last_rows.append(end - 1)
        logits = self.model.next_token_logits(batch, self.cache, np.array(last_rows, dtype=np.int64))
        return logits if last_rows else None

    def release(self, slot: int) -> None:
        """Empties a cache row for its next request."""
        self.cache.reset(slot)
