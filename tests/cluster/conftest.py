"""Fixtures: two replicas of the nano model in a Ray cluster of this process, behind the HTTP server."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import httpx
import openai
import psutil
import pytest

from dsv4.engine import LLM, AsyncEngine
from dsv4.engine.cluster.client import ClusterEngine
from dsv4.engine.cluster.connection import Cluster, ReplicaPlan
from dsv4.engine.config import EngineConfig
from dsv4.model_folder import resolve_model
from dsv4.server.loading import load_llm

from ..server.conftest import Served, folder, serving  # noqa: F401  # the fixture of a folder too

pytestmark = pytest.mark.cluster
HANG = 300.0  # on a machine where ten others compute
CONFIG = EngineConfig(max_num_seqs=4, max_model_len=8192)
WORDS = ("the", "cat", "dog", "house", "tree", "red", "blue", "runs", "sees", "takes", "small", "old", "under", "with")


@dataclass
class Replicas:
    """A server over a cluster."""

    served: Served
    engine: ClusterEngine

    @property
    def url(self) -> str:
        return self.served.url

    def openai(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=retries, timeout=HANG)

    def metric(self, name: str) -> list[float]:
        """Values of a metric of the replicas."""
        lines = httpx.get(f"{self.url}/metrics", timeout=HANG).text.splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{") and 'replica="' in line]

    def until_all_up(self) -> None:
        until(lambda: self.engine.num_up == self.engine.num_replicas)


def until(condition: Callable[[], object], seconds: float = HANG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def replica_processes() -> list[psutil.Process]:
    """Processes of replicas that this process, or one of its children, has started."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica"):
                found.append(process)
    return found


def text_of(seed: int, words: int = 300) -> str:
    """Words that no other seed gives in this order."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def chunks(url: str, body: dict[str, object]) -> list[dict[str, object]]:
    """Chunks of a streamed chat completion."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=HANG) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # for Ray's token
        connection = Cluster("local", num_cpus=4)
        connection.hold()
        yield connection
        connection.let_go()


@pytest.fixture(scope="session")
def replicas(cluster: Cluster) -> Iterator[Replicas]:
    plan = ReplicaPlan("nano", partial(load_llm, resolve_model(None), 1, CONFIG), CONFIG, num_replicas=2, threads=1)
    engine = ClusterEngine(cluster, plan)
    with serving(engine) as served:  # type: ignore[arg-type]
        yield Replicas(served, engine)


@pytest.fixture(scope="session")
def local() -> Iterator[Served]:
    """The same model in an engine of this process."""
    llm = LLM(None, engine_config=CONFIG)
    with serving(llm) as served:
        assert isinstance(served.engine, AsyncEngine)
        yield served
