"""Fixtures: a server over a model with scripted replies: real tokens, real engine, real HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anthropic
import deepseek_recipe as recipe
import httpx
import numpy as np
import openai
import pytest
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.engine import LLM, AsyncEngine
from dsv4.engine.process.client import EngineProcess
from dsv4.model.batch import RaggedBatch
from dsv4.server.app import create_app
from dsv4.server.connections import ClientLimits
from dsv4.server.drain import Drain
from dsv4.server.http_server import HttpServer
from dsv4.server.listening import address, bind
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

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
        self.tokenizer = recipe.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._cache = ScriptedCache(0)
        self.forget()

    def forget(self) -> None:
        """Resets the reply and the recordings."""
        self.reply: str | Callable[[list[int]], str] = "</think>ok"
        self.seconds_per_step = 0.0
        self.seconds_of_prefill = 0.0
        self.fail: str | None = None
        self.prompts: list[list[int]] = []
        self.num_sampled = 0

    def new_cache(self, batch_size: int, max_tokens: int) -> ScriptedCache:
        self._cache = ScriptedCache(batch_size)
        return self._cache

    def next_token_logits(self, batch: RaggedBatch, cache: ScriptedCache, rows: np.ndarray) -> Tensor:
        if self.fail is not None:
            raise RuntimeError(self.fail)
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer and the later effort ladder, whose efforts all differ."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), VOCAB), path)
    write_effort_ladder(path, "0731")
    return path


@pytest.fixture
def model(folder: Path) -> ScriptedModel:
    return ScriptedModel(folder)


@dataclass
class Served:
    """A running server, and clients for it."""

    url: str
    engine: AsyncEngine | EngineProcess
    model: ScriptedModel
    key: str = "unused"
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def openai(self, base: str = "/v1") -> openai.OpenAI:
        client = openai.OpenAI(base_url=self.url + base, api_key=self.key, max_retries=0)
        return self.closing.enter_context(client)

    def anthropic(self, base: str = "/anthropic") -> anthropic.Anthropic:
        client = anthropic.Anthropic(base_url=self.url + base, api_key=self.key, max_retries=0)
        return self.closing.enter_context(client)

    def http(self, **options: object) -> httpx.Client:
        return self.closing.enter_context(httpx.Client(base_url=self.url, timeout=30, **options))  # type: ignore[arg-type]

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while self.engine.num_running or self.engine.num_waiting:
            assert time.monotonic() < deadline, "a ghost request is still running"
            time.sleep(0.005)

    def wait_until_running(self, count: int = 1, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while self.engine.num_running != count:
            assert time.monotonic() < deadline, f"never saw {count} running"
            time.sleep(0.002)


@contextlib.contextmanager
def serving(llm: LLM | EngineProcess, model: ScriptedModel | None = None, **options: object) -> Iterator[Served]:
    """Runs the HTTP server in a thread on a free port of the loopback interface."""
    engine = AsyncEngine(llm) if isinstance(llm, LLM) else llm
    listening = bind("127.0.0.1", 0)
    drain = Drain(grace_seconds=1.0)
    limits = ClientLimits(options.pop("client_seconds", 60.0))  # type: ignore[arg-type]
    bound: int = options.pop("max_connections", 256)  # type: ignore[assignment]
    app = create_app(engine, drain=drain, **options)  # type: ignore[arg-type]
    server = HttpServer(app, listening, drain, limits, bound)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        with contextlib.ExitStack() as closing:
            yield Served(address(listening), engine, model, closing=closing)  # type: ignore[arg-type]
    finally:
        server.should_exit = True
        thread.join(60)
        engine.close()
        listening.close()


@pytest.fixture
def serve(folder: Path) -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """serve(model, **options of create_app and LLM) -> a running server."""

    def start(model: ScriptedModel, **options: object) -> contextlib.AbstractContextManager[Served]:
        limits = {k: options.pop(k) for k in ("max_num_seqs", "max_model_len", "max_num_waiting") if k in options}
        return serving(LLM(model, folder=folder, **limits), model, **options)  # type: ignore[arg-type]

    return start


@pytest.fixture(scope="session")
def shared_server(folder: Path) -> Iterator[Served]:
    model = ScriptedModel(folder)
    with serving(LLM(model, folder=folder), model) as served:
        yield served


@pytest.fixture
def server(shared_server: Served) -> Iterator[Served]:
    """The shared server with its model reset, for tests without options."""
    shared_server.model.forget()
    with contextlib.ExitStack() as closing:
        shared_server.closing = closing
        yield shared_server
    shared_server.wait_until_idle()
