"""Model with scripted replies, for servers and for processes that import no test's libraries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import deepseek_recipe as recipe
import numpy as np
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.model.batch import RaggedBatch

VOCAB = 300
EOS = 1


class ScriptedCache:
    def __init__(self, rows: int) -> None:
        self.histories: list[list[int]] = [[] for _ in range(rows)]
        self.prompt_lengths: dict[int, int] = {}

    def reset(self, row: int) -> None:
        self.histories[row].clear()
        self.prompt_lengths.pop(row, None)


class ScriptedModel:
    """Model that gives the tokens of `reply`, one after the other, then end of sentence, probability 1."""

    def __init__(self, folder: Path) -> None:
        self.config = ModelConfig.from_dict(
            ModelConfig.preset("nano").to_dict() | {"vocab_size": VOCAB, "max_position_embeddings": 65536}
        )
        self.folder = folder
        self.tokenizer = recipe.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._cache = ScriptedCache(0)
        self.forget()

    def forget(self) -> None:
        """Resets the reply and the recordings."""
        self.reply: str | Callable[[list[int]], str] = "</think>ok"
        self.seconds_per_step = 0.0
        self.seconds_of_prefill = 0.0
        self.held: threading.Event | None = None  # its steps wait until it is set
        self.fail: str | None = None
        self.prompts: list[list[int]] = []
        self.num_sampled = 0

    def new_cache(self, batch_size: int, max_tokens: int) -> ScriptedCache:
        self._cache = ScriptedCache(batch_size)
        return self._cache

    def next_token_logits(self, batch: RaggedBatch, cache: ScriptedCache, rows: np.ndarray) -> Tensor:
        if self.fail is not None:
            raise RuntimeError(self.fail)
        if self.held is not None:
            self.held.wait()
        decoding = all(length == 1 for length in batch.lengths.tolist())
        time.sleep(self.seconds_per_step if decoding else self.seconds_of_prefill)
        ids, held = batch.token_ids.tolist(), []
        for length, slot in zip(batch.lengths.tolist(), batch.slots.tolist(), strict=True):
            for _ in range(length):
                cache.histories[slot].append(ids.pop(0))
                held.append((slot, len(cache.histories[slot])))
        return torch.stack([self._next(*held[row]) for row in rows]) if len(rows) else torch.empty(0, VOCAB)

    def _next(self, slot: int, length: int) -> Tensor:
        cache = self._cache
        history = cache.histories[slot]
        if slot not in cache.prompt_lengths:
            cache.prompt_lengths[slot] = length
            self.prompts.append(list(history))
        start = cache.prompt_lengths[slot]
        text = self.reply if isinstance(self.reply, str) else self.reply(history[:start])
        script = self.tokenizer.encode(text)
        step = length - start
        token = script[step] if step < len(script) else EOS
        self.num_sampled += 1
        return torch.nn.functional.one_hot(torch.tensor(token), VOCAB).float() * 50.0
