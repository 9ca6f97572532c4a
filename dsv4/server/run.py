"""serve: binds the port, loads a model, prints the address of the chat page, and serves until it is stopped."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.engine.config import EngineConfig
from dsv4.kernels import backends
from dsv4.model_folder import resolve_model
from dsv4.options import check_keywords, pick_keywords, takes_options
from dsv4.server.config import ServerConfig
from dsv4.server.listening import address, bind, is_loopback
from dsv4.server.open_files import connection_bound, raise_limit
from dsv4.server.response_store import ResponseStore
from dsv4.usage.ledger import Ledger
from dsv4.usage.store import open_store

if TYPE_CHECKING:
    from dsv4.engine import LLM
    from dsv4.engine.interface import Engine


@takes_options(ServerConfig, EngineConfig)
def serve(model: str | Path | None = None, **options: Any) -> None:
    """Serves a model folder, by default the embedded nano model, until it is stopped.

    `options`: fields of ServerConfig and EngineConfig. Raises PortTakenError and errors of the usage database before
    the model is loaded, TypeError for an unknown option, ValueError for a value that is not allowed, CapacityError if
    the model cannot fit into memory, and the errors of loading.
    """
    check_keywords("serve", options, ServerConfig, EngineConfig)
    config, engine_config = pick_keywords(ServerConfig, options), pick_keywords(EngineConfig, options)
    raise_limit()
    bound = connection_bound(config.max_connections)
    if config.log_format != "text" or config.log_requests:
        from dsv4.server.request_log import configure_logging

        configure_logging(config.log_format, config.log_requests)
    listening = bind(config.host, config.port)
    with contextlib.ExitStack() as opened:
        opened.callback(listening.close)
        responses = ResponseStore(config.response_store, config.response_store_bytes)
        opened.callback(responses.close)
        ledger = None if config.usage_db is None else Ledger(open_store(config.usage_db))
        if ledger is not None:
            opened.callback(ledger.close)
        # Imported only now, which takes seconds: a taken port fails before that.
        from dsv4.engine.process.client import EngineProcess
        from dsv4.engine.process.served_model import describe
        from dsv4.server.app import create_app
        from dsv4.server.connections import ClientLimits
        from dsv4.server.drain import Drain
        from dsv4.server.http_server import HttpServer
        from dsv4.server.key_limits import KeyLimits
        from dsv4.server.origin import OriginPolicy

        drain, limits = Drain(config.grace_seconds), ClientLimits(config.client_seconds)
        origins = OriginPolicy(
            bound_host=config.host,
            loopback=is_loopback(listening),
            needs_key=bool(config.api_keys),
            allowed_hosts=tuple(config.allowed_hosts),
            allowed_origins=tuple(config.allowed_origins),
        )
        # Parallel `tokenizers` queues texts in one thread pool: a short text would wait behind long ones.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        engine = start_engine(model, config, engine_config)
        try:
            app = create_app(
                engine,
                api_keys=config.api_keys,
                origins=origins,
                drain=drain,
                share_prefixes=config.share_prefixes,
                responses=responses,
                ledger=ledger,
                key_limits=KeyLimits(config.max_requests_per_key, config.tokens_per_minute_per_key),
            )
            server = HttpServer(app, listening, drain, limits, bound)
            lines = engine.llm.facts.description if isinstance(engine, EngineProcess) else describe(engine.llm)
            server.on_ready = lambda: announce(engine.llm.name, address(listening), lines)
            server.run()
        except BaseException:
            engine.close()
            raise
        if ledger is not None:
            ledger.close()  # before the engine, whose close may end the process
        close_engine(engine, seconds=max(1.0, drain.remaining))


def start_engine(model: str | Path | None, config: ServerConfig, engine_config: EngineConfig) -> Engine:
    """The engine, in a process of its own where the config and the system allow it. Raises the errors of loading."""
    if not config.engine_process or sys.platform == "win32":
        from dsv4.engine import AsyncEngine

        return AsyncEngine(load_llm(model, config.threads, engine_config))
    from dsv4.engine.process.client import EngineProcess
    from dsv4.engine.process.restarts import RestartPolicy

    # A name is resolved once: a process that is started again has the same weights.
    make = partial(load_llm, resolve_model(model, engine_config.revision), config.threads)
    make = partial(make, replace(engine_config, revision=None))
    return EngineProcess(make, RestartPolicy(config.max_crashes), config.compile_seconds)


def load_llm(model: str | Path | None, threads: int | None, engine_config: EngineConfig) -> LLM:
    """Loads the served model, in the process of the engine."""
    import torch

    from dsv4.engine import LLM

    if threads is not None:
        torch.set_num_threads(threads)
    backends.native_module()  # resolved before loading, so that a fallback warning is printed first
    return LLM(model, engine_config=engine_config)


def close_engine(engine: Engine, seconds: float) -> None:
    """Closes the engine; exits the process with status 0 if the last step takes longer than `seconds`.

    A step cannot be interrupted, and nothing needs its result. A lingering process would be killed.
    """

    def close() -> None:
        from dsv4.engine import AsyncEngine

        engine.close()
        if isinstance(engine, AsyncEngine):
            engine.llm.close()  # the process of an engine does so itself

    closing = threading.Thread(target=close, name="dsv4-close", daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def announce(model_name: str, url: str, description: Sequence[str]) -> None:
    """Prints the base URLs and a description of the loaded model."""
    print(f"{model_name} is ready. Chat page: {url}/")
    print(f"OpenAI base URL: {url}/v1   Anthropic base URL: {url}/anthropic   (Ctrl-C stops)")
    for line in description:
        print(line)
    sys.stdout.flush()
