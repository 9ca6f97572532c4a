"""serve: binds the port, loads models, prints the address of the chat page, and serves until it is stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.engine.config import EngineConfig
from dsv4.engine.garbage import keep_what_is_loaded
from dsv4.options import check_keywords, pick_keywords, takes_options
from dsv4.server.config import ServerConfig
from dsv4.server.listening import address, bind, is_loopback
from dsv4.server.loading import Loading, close_all, description, load_engines
from dsv4.server.open_files import connection_bound, raise_limit
from dsv4.server.response_store import ResponseStore
from dsv4.usage.ledger import Ledger
from dsv4.usage.store import open_store

if TYPE_CHECKING:
    from dsv4.engine.interface import Engine


logger = logging.getLogger("dsv4.server")


@takes_options(ServerConfig, EngineConfig)
def serve(model: str | Path | Sequence[str | Path] | None = None, **options: Any) -> None:
    """Serves a model folder or several, by default the embedded nano model, until it is stopped.

    `options`: fields of ServerConfig and EngineConfig; the latter hold for each model. The port is bound at once, and
    answers 503 while the models are loaded. Raises PortTakenError and errors of the usage database before that,
    TypeError for an unknown option, ValueError for a value that is not allowed, CapacityError if the models cannot fit
    into memory, and the errors of loading.
    """
    check_keywords("serve", options, ServerConfig, EngineConfig)
    config, engine_config = pick_keywords(ServerConfig, options), pick_keywords(EngineConfig, options)
    models = list(model) if isinstance(model, Sequence) and not isinstance(model, str) else [model]
    if not models:
        raise ValueError("there is no model to serve; allowed: 1 or more")
    raise_limit()
    bound = connection_bound(config.max_connections)
    if config.log_format != "text" or config.log_requests or config.log_prompts:
        from dsv4.server.request_log import configure_logging

        configure_logging(config.log_format, config.log_requests, config.log_prompts)
    listening = bind(config.host, config.port)
    if not is_loopback(listening) and not config.api_keys:
        logger.warning(
            "everyone who reaches %s:%d may use this server: it has no API keys (--api-key-file), and its address is "
            "not of this machine alone",
            *listening.getsockname()[:2],
        )
    with contextlib.ExitStack() as opened:
        opened.callback(listening.close)
        responses = ResponseStore(config.response_store, config.response_store_bytes)
        opened.callback(responses.close)
        ledger = None if config.usage_db is None else Ledger(open_store(config.usage_db))
        if ledger is not None:
            opened.callback(ledger.close)
        # Imported only now, which takes seconds: a taken port fails before that.
        from dsv4.server.connections import ClientLimits
        from dsv4.server.drain import Drain
        from dsv4.server.http_server import HttpServer
        from dsv4.server.loading_app import LoadingApp

        drain, limits = Drain(config.grace_seconds), ClientLimits(config.client_seconds)
        # Parallel `tokenizers` queues texts in one thread pool: a short text would wait behind long ones.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        app = LoadingApp()
        server = HttpServer(app, listening, drain, limits, bound)

        def load() -> list[Engine]:
            from dsv4.server.app import Services, create_app

            engines = load_engines(models, config, engine_config)
            try:
                made = create_app(engines, config, Services(drain, responses, ledger, is_loopback(listening)))
            except BaseException:
                close_all(engines)
                raise
            keep_what_is_loaded()  # before requests come: they would wait for it, and what is theirs be kept too
            app.app = made
            announce(engines, address(listening))
            return engines

        loading = Loading(load, on_failure=server.stop)
        server.on_ready = loading.start
        server.run()
        if not loading.done:  # stopped meanwhile; loading cannot be interrupted either
            exit_now()
        if ledger is not None:
            ledger.close()  # before the engines, whose close may end the process
        close_engines(loading.result(), seconds=max(1.0, drain.remaining))


def close_engines(engines: Sequence[Engine], seconds: float) -> None:
    """Closes engines; exits the process with status 0 if their last step takes longer than `seconds`.

    A step cannot be interrupted, and nothing needs its result. A lingering process would be killed.
    """
    closing = threading.Thread(target=close_all, args=(engines,), name="dsv4-close", daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        exit_now()


def exit_now() -> None:
    """Ends the process with status 0, without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def announce(engines: Sequence[Engine], url: str) -> None:
    """Prints the base URLs, and each model's description."""
    names = [engine.llm.name for engine in engines]
    print(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} ready. Chat page: {url}/")
    print(f"OpenAI base URL: {url}/v1   Anthropic base URL: {url}/anthropic   (Ctrl-C stops)")
    for engine in engines:
        of = "" if len(engines) == 1 else f"{engine.llm.name}: "
        for line in description(engine):
            print(f"{of}{line}")
    sys.stdout.flush()
