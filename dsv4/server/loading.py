"""Loads the models of a server, in a thread of their own while the server already answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from dsv4.engine.config import EngineConfig

if TYPE_CHECKING:
    from dsv4.engine import AsyncEngine

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


def load_engines(models: Sequence[str | Path | None], config: EngineConfig) -> list[AsyncEngine]:
    """An engine for each model, all with the same options. The names and the memory of all are checked first.

    ValueError for two models of one name, CapacityError if they cannot fit together, and the errors of loading.
    """
    from dsv4.engine import LLM, AsyncEngine

    if len(models) > 1:
        _check_together(models, config)
    engines: list[AsyncEngine] = []
    try:
        for model in models:
            engines.append(AsyncEngine(LLM(model, engine_config=config)))
    except BaseException:
        close_all(engines)
        raise
    return engines


def _check_together(models: Sequence[str | Path | None], config: EngineConfig) -> None:
    from dsv4.engine.loading import check_capacity
    from dsv4.model_folder import model_name, resolve_model
    from dsv4.server.served_models import check_names

    folders = [resolve_model(model, config.revision) for model in models]
    check_names([model_name(folder) for folder in folders])
    if config.check_memory:
        check_capacity(folders, config)


def close_all(engines: Sequence[AsyncEngine]) -> None:
    for engine in engines:
        engine.close()
        engine.llm.close()
