"""serve: loads a model, binds the port, prints where the chat page is, and serves until it is told to stop."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.engine.config import EngineConfig
from dsv4.kernels import backends
from dsv4.options import check_keywords, pick_keywords, takes_options
from dsv4.server.config import ServerConfig
from dsv4.server.open_files import connection_bound, raise_limit

if TYPE_CHECKING:
    from dsv4.engine import AsyncEngine


class PortTakenError(OSError):
    """The address cannot be listened on, most often because another process does."""


@takes_options(ServerConfig, EngineConfig)
def serve(model: str | Path | None = None, **options: Any) -> None:
    """Serves a model folder, by default the embedded nano model, until it is told to stop.

    `options`: fields of ServerConfig and EngineConfig. Raises PortTakenError before the model is loaded, TypeError for
    an unknown option, ValueError for a value that is not allowed, CapacityError where the model cannot fit into memory,
    and whatever loading raises.
    """
    check_keywords("serve", options, ServerConfig, EngineConfig)
    config, engine_config = pick_keywords(ServerConfig, options), pick_keywords(EngineConfig, options)
    raise_limit()
    bound = connection_bound(config.max_connections)
    listening = bind(config.host, config.port)
    try:
        # torch is needed from here on; a taken port is known before its seconds are spent.
        import torch

        from dsv4.engine import LLM, AsyncEngine
        from dsv4.server.app import create_app
        from dsv4.server.connections import ClientLimits
        from dsv4.server.drain import Drain
        from dsv4.server.http_server import HttpServer
        from dsv4.server.origin import OriginPolicy

        drain, limits = Drain(config.grace_seconds), ClientLimits(config.client_seconds)
        origins = OriginPolicy(
            bound_host=config.host,
            loopback=is_loopback(listening),
            needs_key=bool(config.api_keys),
            allowed_hosts=tuple(config.allowed_hosts),
            allowed_origins=tuple(config.allowed_origins),
        )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        # `tokenizers` queues texts for a pool of its own: a short one would wait there behind long ones.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        backends.native_module()  # chosen now, so that a reason why the reference runs comes first
        llm = LLM(model, engine_config=engine_config)
        engine = AsyncEngine(llm)
        try:
            app = create_app(engine, api_keys=config.api_keys, origins=origins, drain=drain)
            server = HttpServer(app, listening, drain, limits, bound)
            server.on_ready = lambda: announce(llm.name, address(listening))
            server.run()
        except BaseException:
            engine.close()
            raise
        close_engine(engine, seconds=max(1.0, drain.remaining))
    finally:
        listening.close()


def close_engine(engine: AsyncEngine, seconds: float) -> None:
    """Closes the engine; ends the process, status 0, when its last step takes longer than `seconds`.

    A step cannot be interrupted and nobody waits for its result. A process that lingered would be killed.
    """
    closing = threading.Thread(target=engine.close, name="dsv4-close", daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. PortTakenError names the port and the way out; ValueError a port or host that cannot be."""
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise ValueError(f"port is {port}; allowed: [0, 65535], 0 for any free port")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # an over-long label is no OSError
        raise ValueError(f"host is {host!r}; allowed: a name or an address of this machine ({error})") from error
    listening = socket.socket(family, kind, protocol)
    # So that a server that was just stopped does not keep its port for a minute.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(where)
        listening.listen()  # two servers can bind one port before either listens: only now it is ours
    except OSError as error:
        listening.close()
        raise PortTakenError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it or choose another with --port"
        ) from error
    return listening


def address(listening: socket.socket) -> str:
    """The base URL of a bound socket, as a browser on this machine reaches it."""
    name: tuple[str, int] = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0])
    return f"http://[{host}]:{name[1]}" if ":" in host else f"http://{host}:{name[1]}"


def is_loopback(listening: socket.socket) -> bool:
    """True if a bound socket can be reached from this machine only."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def announce(model_name: str, url: str) -> None:
    """Prints the addresses, and the kernels when they are native."""
    print(f"{model_name} is ready. Chat page: {url}/")
    print(f"OpenAI base URL: {url}/v1   Anthropic base URL: {url}/anthropic   (Ctrl-C stops)")
    if backends.name() == "native":
        print(backends.describe())
    sys.stdout.flush()
