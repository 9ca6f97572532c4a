"""Fixtures: a stand-in model whose logits depend on the whole history of a cache slot, and on nothing else."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import deepseek_recipe as recipe
import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.engine import LLM, SamplingParams, TokenEvent
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

from ..model.tiny import random_model
from .prefixes import CONFIG

VOCAB = 53
TEXT_VOCAB = 300
EOS = 1


@dataclass
class HistoryCache:
    histories: list[list[int]]
    resets: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(history) for history in self.histories]

    def reset(self, row: int) -> None:
        self.histories[row].clear()
        self.resets.append(row)

    def expect_drafts(self, row: int, start: int, count: int) -> None:
        assert start >= len(self.histories[row]) and count > 0

    def truncate(self, row: int, length: int) -> None:
        assert length < len(self.histories[row]), "nothing to take back"
        del self.histories[row][length:]


class HistoryModel:
    """Logits are a hash of all tokens that the slot has seen: any error in the bookkeeping changes them."""

    def __init__(self, vocab_size: int = VOCAB) -> None:
        self.config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            q_lora_rank=32,
            o_groups=1,
            index_topk=4,
            n_routed_experts=8,
            moe_intermediate_size=32,
            compress_ratios=(0, 0),
            routed_scaling_factor=1.0,
            max_position_embeddings=4096,
            eos_token_id=EOS,
            num_hash_layers=0,
            rope_scaling=None,
        )
        self.batches: list[list[tuple[int, int, int]]] = []  # per step: (slot, start, count)
        self.seconds_per_step = 0.0
        self.fail_at_step: int | None = None
        self.cache: HistoryCache | None = None
        self.scripts: dict[tuple[int, ...], list[int]] = {}  # prompt -> tokens with probability 1

    def new_cache(self, batch_size: int, max_tokens: int) -> HistoryCache:
        self.cache = HistoryCache([[] for _ in range(batch_size)])
        return self.cache

    def next_token_logits(self, batch: RaggedBatch, cache: HistoryCache, rows: np.ndarray) -> Tensor:
        time.sleep(self.seconds_per_step)
        if self.fail_at_step == len(self.batches):
            raise RuntimeError("the model broke")
        ids, chunks, keys = batch.token_ids.tolist(), [], []
        for length, start, slot in zip(*(a.tolist() for a in (batch.lengths, batch.starts, batch.slots)), strict=True):
            assert start == len(cache.histories[slot]), "a chunk must continue its row"
            chunks.append((slot, start, length))
            for _ in range(length):
                cache.histories[slot].append(ids.pop(0))
                keys.append(self._key(cache.histories[slot]))
        self.batches.append(chunks)
        return torch.stack([self._logits(keys[row]) for row in rows]) if len(rows) else torch.empty(0)

    def expected_logits(self, history: list[int]) -> Tensor:
        return self._logits(self._key(history))

    def _key(self, history: list[int]) -> int:
        for prompt, script in self.scripts.items():
            written = len(history) - len(prompt)
            if tuple(history[: len(prompt)]) == prompt and 0 <= written < len(script):
                return -1 - script[written]
        return zlib.crc32(str(history).encode())

    def _logits(self, key: int) -> Tensor:
        if key < 0:
            return torch.nn.functional.one_hot(torch.tensor(-1 - key), self.config.vocab_size).float() * 100.0
        return torch.randn(self.config.vocab_size, generator=torch.Generator().manual_seed(key))


class ScriptedLLM(LLM):
    """An LLM with a tokenizer and scripted replies, one per call; it records its prompts."""

    def __init__(self, folder: Path, replies: list[str]) -> None:
        super().__init__(HistoryModel(TEXT_VOCAB), folder=folder)
        self.replies = replies
        self.asked: list[tuple[str, SamplingParams]] = []

    def stream(self, prompt, params=None):
        self.asked.append((self.tokenizer.decode(prompt), params))
        ids = recipe.Tokenizer.from_file(str(self.path / "tokenizer.json")).encode(self.replies.pop(0))
        for token in ids:
            yield TokenEvent([token], "", [], [])
        yield TokenEvent([EOS], "", [], [], "stop")


PATHS = ["reference", *(["native"] if backends.native_module() is not None else [])]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend that this machine has."""
    if request.param == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    return request.param


@pytest.fixture(params=["float", "shipped"])
def each_model(request: pytest.FixtureRequest, path: str) -> Iterator[Transformer]:
    """The small model of the tests of stored prefixes, in both numerics, on each backend."""
    with torch.no_grad():
        yield random_model(CONFIG, numerics=request.param)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer only."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), TEXT_VOCAB), path)
    return path


@pytest.fixture
def scripted(text_folder: Path):
    """scripted(reply, reply, ...) -> an LLM with these replies."""
    return lambda *replies: ScriptedLLM(text_folder, list(replies))


@pytest.fixture
def model() -> HistoryModel:
    return HistoryModel()
