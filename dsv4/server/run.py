"""serve: loads a model, binds the port, prints where the chat page is, and serves until Ctrl-C."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from dsv4.kernels import native

SHUTDOWN_SECONDS = 3  # what open streams get to end after Ctrl-C


class PortTakenError(OSError):
    """The address cannot be listened on, most often because another process does."""


def serve(
    model: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    max_num_seqs: int = 8,
    max_model_len: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    check_values: bool = True,
) -> None:
    """Serves a model folder, by default the embedded nano model. `port` 0 takes a free one.

    check_values: as of `dsv4.load`.

    Raises PortTakenError before the model is loaded, and whatever loading it raises.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; allowed: 1 or more")
    listening = bind(host, port)
    try:
        # torch is needed from here on; a taken port is known before its seconds are spent.
        import torch

        from dsv4.engine import LLM, AsyncEngine
        from dsv4.server.app import create_app

        if threads is not None:
            torch.set_num_threads(threads)
        native.module()  # chosen now, so that a reason why the reference runs comes first
        llm = LLM(
            model, max_num_seqs=max_num_seqs, max_model_len=max_model_len, device=device, check_values=check_values
        )
        engine = AsyncEngine(llm)
        try:
            app = create_app(engine, api_keys=api_keys)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
            AnnouncingServer(config, llm.name, address(listening)).run(sockets=[listening])
        finally:
            engine.close()
    finally:
        listening.close()


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


class AnnouncingServer(uvicorn.Server):
    """Prints the addresses, and the kernels when they are native, once requests are taken."""

    def __init__(self, config: uvicorn.Config, model_name: str, url: str) -> None:
        super().__init__(config)
        self._model_name, self._url = model_name, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"{self._model_name} is ready. Chat page: {self._url}/")
            print(f"OpenAI base URL: {self._url}/v1   Anthropic base URL: {self._url}/anthropic   (Ctrl-C stops)")
            if native.name() == "native":
                print(native.describe())
            sys.stdout.flush()
