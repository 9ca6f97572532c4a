"""Fixtures: a server over a model with scripted replies: real tokens, real engine, real HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from dsv4.engine import LLM, AsyncEngine
from dsv4.engine.process.client import EngineProcess
from dsv4.server.app import Services, create_app
from dsv4.server.config import ServerConfig
from dsv4.server.connections import ClientLimits
from dsv4.server.drain import Drain
from dsv4.server.http_server import HttpServer
from dsv4.server.listening import address, bind
from dsv4.tokenizer.prompts import write_effort_ladder
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

from .scripted_model import VOCAB, ScriptedModel


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
    """Runs the HTTP server in a thread on a free port of the loopback interface. `options`: of it, its app's config,
    and the services that are not made here.
    """
    engine = AsyncEngine(llm) if isinstance(llm, LLM) else llm
    listening = bind("127.0.0.1", 0)
    drain = Drain(grace_seconds=1.0)
    limits = ClientLimits(options.pop("client_seconds", 60.0))  # type: ignore[arg-type]
    bound: int = options.pop("max_connections", 256)  # type: ignore[assignment]
    others: list[AsyncEngine] = options.pop("others", [])  # type: ignore[assignment]
    given = {name: options.pop(name) for name in ("responses", "ledger", "keep_alive_seconds") if name in options}
    app = create_app([engine, *others], ServerConfig(**options), Services(drain, **given))  # type: ignore[arg-type]
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
    """serve(model, **options of `serving` and LLM) -> a running server."""

    def start(model: ScriptedModel, **options: object) -> contextlib.AbstractContextManager[Served]:
        names = ("max_num_seqs", "max_model_len", "max_num_waiting", "max_queue_seconds")
        limits = {name: options.pop(name) for name in names if name in options}
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
