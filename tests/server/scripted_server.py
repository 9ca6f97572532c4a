"""A server process over a scripted model: `python scripted_server.py '{"reply": ..., "seconds_per_step": ...}'`.

Settings other than the model's fields are options of HttpServer's parts: grace_seconds, client_seconds,
keep_alive_seconds, max_connections; engine_process: true runs the engine in a process of its own. Prints its URL once
it is ready.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from dsv4.engine import AsyncEngine
from dsv4.engine.process.client import EngineProcess
from dsv4.server.app import KEEP_ALIVE_SECONDS, Services, create_app
from dsv4.server.connections import ClientLimits
from dsv4.server.drain import Drain
from dsv4.server.http_server import HttpServer
from dsv4.server.listening import address, bind
from dsv4.server.open_files import connection_bound, raise_limit
from dsv4.server.run import close_engines
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer
from tests.server.scripted_engine import scripted_llm
from tests.server.scripted_model import VOCAB


def main(settings: dict[str, object]) -> None:
    raise_limit()
    listening = bind("127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        write_tokenizer(train_tokenizer(iter(["the cat sat on the mat"] * 4), VOCAB), folder)
        drain = Drain(float(settings.pop("grace_seconds", 8.0)))
        limits = ClientLimits(float(settings.pop("client_seconds", 60.0)))
        bound = connection_bound(settings.pop("max_connections", None))
        own_process = settings.pop("engine_process", False)
        services = Services(drain, keep_alive_seconds=float(settings.pop("keep_alive_seconds", KEEP_ALIVE_SECONDS)))
        make = partial(scripted_llm, folder, settings)
        engine = EngineProcess(make) if own_process else AsyncEngine(make())
        server = HttpServer(create_app([engine], services=services), listening, drain, limits, bound)
        server.on_ready = lambda: print(address(listening), flush=True)
        server.run()
        close_engines([engine], seconds=max(1.0, drain.remaining))


main(json.loads(sys.argv[1]))
