"""Tracing: the last token of a sequence traced in a cache of its own, a part of the sequence per step."""

from __future__ import annotations

import numpy as np

from dsv4.cache import Cache
from dsv4.engine.model import EngineModel
from dsv4.model.batch import RaggedBatch
from dsv4.model.trace import TokenTrace, trace_token
from dsv4.model.transformer import Transformer

STEP_TOKENS = 256  # computed per step, so that running requests wait for no more than that
MAX_TRACED_TOKENS = 1 << 16  # a trace computes all of them again


class Tracing:
    """Trace in progress. Not thread-safe: the engine's thread calls `step`.

    kv_cache_dtype: of the cache, as in EngineConfig.
    ValueError for a model without layers to trace, an empty sequence, or one of more than MAX_TRACED_TOKENS tokens.
    """

    def __init__(self, model: EngineModel, token_ids: list[int], max_model_len: int, kv_cache_dtype: str) -> None:
        if not isinstance(model, Transformer):
            raise ValueError(f"a {type(model).__name__} cannot be traced; allowed: a Transformer")
        most = min(MAX_TRACED_TOKENS, max_model_len)
        if not 1 <= len(token_ids) <= most:
            raise ValueError(f"a sequence of {len(token_ids)} tokens cannot be traced; allowed: 1 to {most}")
        self._model, self._ids, self._kv_cache_dtype = model, token_ids, kv_cache_dtype
        self._cache: Cache | None = None

    def step(self) -> TokenTrace | None:
        """Computes the next tokens; the trace after the last one."""
        if self._cache is None:
            self._cache = self._model.new_cache(1, len(self._ids), kv_cache_dtype=self._kv_cache_dtype)
        start = self._cache.lengths[0]
        part = self._ids[start : min(start + STEP_TOKENS, len(self._ids) - 1)]
        if part:
            batch = RaggedBatch.pack([part], starts=[start], device=self._model.device)
            self._model.next_token_logits(batch, self._cache, rows=np.zeros(0, np.int64))
            return None
        return trace_token(self._model, self._cache, self._ids[-1])
