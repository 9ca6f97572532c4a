"""`dsv4 serve`: serve a model."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.commands.options import add_command, add_model, add_weight_check
from dsv4.server.run import CLIENT_SECONDS, GRACE_SECONDS

DTYPES = ("auto", "bfloat16", "float32")


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        "serve a chat page and the OpenAI and Anthropic APIs",
        "dsv4 serve\ndsv4 serve path/to/model --port 9000 --api-key sk-one --api-key sk-two",
    )
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    _add_access(parser)
    parser.add_argument(
        "--max-num-seqs", type=int, default=8, metavar="N", help="requests computed at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait for their turn; more are told to come again (default: %(default)s)",
    )
    parser.add_argument(
        "--max-model-len", type=int, default=None, metavar="N", help="tokens a request may hold, prompt included"
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads of a forward")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the matrices and the cache (default: %(default)s, float32 on the CPU, bfloat16 on a GPU)",
    )
    add_weight_check(parser)
    parser.add_argument(
        "--no-memory-check", action="store_true", help="load a model that does not seem to fit into memory"
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Options of `serve` that say who may use it and for how long."""
    access = parser.add_argument_group("who may use it, and for how long")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="require one of these keys; repeatable. Every process of this machine can read it here: better the "
        "environment variable DSV4_API_KEY (comma-separated) or --api-key-file",
    )
    access.add_argument(
        "--api-key-file", metavar="FILE", help="require one of the keys in FILE, one a line, # comments"
    )
    access.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a further name of this server; repeatable"
    )
    access.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this origin, like https://chat.example, may use the server; repeatable",
    )
    access.add_argument(
        "--grace-seconds",
        type=float,
        default=GRACE_SECONDS,
        metavar="S",
        help="what open requests get to end after SIGTERM or Ctrl-C (default: %(default)g)",
    )
    access.add_argument(
        "--client-seconds",
        type=float,
        default=CLIENT_SECONDS,
        metavar="S",
        help="how long a client may take to send a request, or not read its answer (default: %(default)g)",
    )
    access.add_argument(
        "--max-connections",
        type=int,
        default=None,
        metavar="N",
        help="connections open at once (default: what the limit of open files leaves, at most 4096)",
    )


def run(options: argparse.Namespace) -> int | None:
    from dsv4.server.keys import collect_keys
    from dsv4.server.run import serve

    return serve(
        model=options.model,
        host=options.host,
        port=options.port,
        api_keys=collect_keys(options.api_key, options.api_key_file),
        grace_seconds=options.grace_seconds,
        client_seconds=options.client_seconds,
        max_connections=options.max_connections,
        allowed_hosts=options.allowed_host,
        allowed_origins=options.allowed_origin,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        threads=options.threads,
        device=options.device,
        max_waiting=options.max_waiting,
        dtype=options.dtype,
        check_memory=not options.no_memory_check,
        check_values=not options.skip_weight_check,
    )
