"""Loads the models of a server, in a thread of their own while the server already answers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from dsv4.engine.config import EngineConfig
from dsv4.kernels import backends
from dsv4.model_folder import resolve_model
from dsv4.server.config import ServerConfig

if TYPE_CHECKING:
    from dsv4.engine import LLM
    from dsv4.engine.interface import Engine

T = TypeVar("T")


class Loading(Generic[T]):
    """Work in a daemon thread. `on_failure` is called in it after an error, which `result` raises."""

    def __init__(self, work: Callable[[], T], on_failure: Callable[[], None]) -> None:
        self._work, self._on_failure = work, on_failure
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dsv4-load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        return bool(self._results) or self._error is not None

    def result(self) -> T:
        """The result of the work that is done. Raises its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:  # raised again by `result`, in the main thread
            self._error = error
            self._on_failure()


def load_engines(models: Sequence[str | Path | None], server: ServerConfig, config: EngineConfig) -> list[Engine]:
    """An engine for each model, all with the same options, in processes of their own where server and system allow it.
    The names and the memory of all are checked first.

    ValueError for two models of one name, CapacityError if they cannot fit together, and the errors of loading.
    """
    if len(models) > 1:
        _check_together(models, config, in_cluster=server.cluster is not None)
    start = start_engine if server.cluster is None else _cluster_starter(len(models), server)
    engines: list[Engine] = []
    try:
        for model in models:
            engines.append(start(model, server, config))
    except BaseException:
        close_all(engines)
        raise
    return engines


def _check_together(models: Sequence[str | Path | None], config: EngineConfig, in_cluster: bool) -> None:
    from dsv4.engine.loading import check_capacity
    from dsv4.model_folder import model_name
    from dsv4.server.served_models import check_names

    folders = [resolve_model(model, config.revision) for model in models]
    check_names([model_name(folder) for folder in folders])
    if config.check_memory and not in_cluster:  # whose machines look at their own memory
        check_capacity(folders, config)


def close_all(engines: Sequence[Engine]) -> None:
    from dsv4.engine.process.served_model import ServedModel

    for engine in engines:
        engine.close()
        if not isinstance(engine.llm, ServedModel):  # other processes close their models themselves
            cast("LLM", engine.llm).close()


def start_engine(model: str | Path | None, server: ServerConfig, config: EngineConfig) -> Engine:
    """The engine of a model. Raises the errors of loading."""
    if not server.engine_process or sys.platform == "win32":
        from dsv4.engine import AsyncEngine

        return AsyncEngine(load_llm(model, server.threads, config), server.compile_seconds)
    from dsv4.engine.process.client import EngineProcess
    from dsv4.engine.process.restarts import RestartPolicy

    # A name is resolved once: a process that is started again has the same weights.
    folder = resolve_model(model, config.revision)
    make = partial(load_llm, folder, server.threads, replace(config, revision=None))
    restarts = RestartPolicy(server.max_crashes)
    seconds = server.compile_seconds, server.stuck_seconds, config.max_queue_seconds
    return EngineProcess(make, restarts, *seconds)


def _cluster_starter(num_models: int, server: ServerConfig) -> Callable[..., Engine]:
    """`start_engine` for engines in a cluster, which is started or joined now. Raises ClusterError."""
    from dsv4.engine.cluster.client import ClusterEngine
    from dsv4.engine.cluster.connection import Cluster, ReplicaPlan
    from dsv4.model_folder import model_name

    assert server.cluster is not None
    num_engines = num_models * server.replicas
    cluster = Cluster(server.cluster, num_cpus=max(os.cpu_count() or 1, num_engines * (server.threads or 1)))
    threads = server.threads or cluster.share(num_engines)

    def start(model: str | Path | None, server: ServerConfig, config: EngineConfig) -> Engine:
        folder = resolve_model(model, config.revision)
        make = partial(load_llm, folder, threads, replace(config, revision=None))
        seconds = server.compile_seconds, server.stuck_seconds
        plan = ReplicaPlan(model_name(folder), make, config, server.replicas, threads, *seconds)
        return ClusterEngine(cluster, plan)

    return start


def load_llm(model: str | Path | None, threads: int | None, config: EngineConfig) -> LLM:
    """Loads a model, in the process of its engine."""
    import torch

    from dsv4.engine import LLM

    if threads is not None:
        torch.set_num_threads(threads)
    backends.native_module()  # resolved before loading, so that a fallback warning is printed first
    return LLM(model, engine_config=config)


def description(engine: Engine) -> Sequence[str]:
    """Lines about the loaded model, for whoever starts the server."""
    from dsv4.engine.process.served_model import ServedModel, describe

    return engine.llm.facts.description if isinstance(engine.llm, ServedModel) else describe(engine.llm)
