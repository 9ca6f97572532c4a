"""ServerConfig: every option of the server itself, from which keywords of `serve` and flags of `dsv4 serve` follow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.conversation.said_turns import MAX_BYTES as TURN_BYTES
from dsv4.engine.config import ENGINE
from dsv4.options import check_options, option
from dsv4.server.response_store import MAX_BYTES

SHARING = ("all", "key", "user")  # of stored prefixes: see server/isolation.py
ACCESS, LOGGING, STORES = "access and limits", "logging", "records"  # groups of flags
CLUSTER = "several engines, on several machines"
CLUSTERS = "local, auto, or HOST:PORT of a Ray cluster"


@dataclass(frozen=True)
class ServerConfig:
    """Address, access rules and limits of the server; ValueError names a value that is not allowed.

    Numbers and choices are checked here, other values where they are used: the address in server/listening.py, keys
    in server/keys.py, names in server/origin.py, the database in usage/store.py.
    """

    host: str = option("127.0.0.1", "address to listen on (default: %(default)s, this machine only)")
    port: int = option(8000, "default: %(default)s")  # 0: any free port
    threads: int | None = option(
        None, "CPU threads for the model (default: one per core)", minimum=1, metavar="N", group=ENGINE
    )
    log_format: str = option(
        "text",
        "of the log, which goes to stderr (default: %(default)s)",
        choices=("text", "json"),
        group=LOGGING,
    )
    log_requests: bool = option(
        False,
        "log a line for every request: its id, path, status and seconds, no keys and no text",
        group=LOGGING,
    )
    log_prompts: bool = option(
        False,
        "log the prompt of every request, as the model reads it (default: no text of a client is logged)",
        group=LOGGING,
    )
    engine_process: bool = option(
        True,
        "run the engine in the server's own process: for debuggers; a crash ends both",
        flag="--engine-in-process",
        group=ENGINE,
    )
    max_crashes: int = option(
        5,
        "starts of the engine process after crashes in a row; then it is given up (default: %(default)s)",
        minimum=0,
        metavar="N",
        group=ENGINE,
    )
    stuck_seconds: float = option(
        600.0,
        "an engine process that has work and takes no step for so long is killed and started again; more than the "
        "longest step takes, 0: never (default: %(default)g)",
        unit="seconds",
        minimum=0,
        metavar="S",
        group=ENGINE,
    )
    compile_seconds: float = option(
        10.0,
        "time limit for compiling the grammar of a request's schema or tools; beyond it the request is refused "
        "(default: %(default)g)",
        metavar="S",
        group=ENGINE,
    )
    cluster: str | None = option(
        None,
        "compute in engines of a Ray cluster: its address (HOST:PORT), auto (the one that runs on this machine), or "
        "without a value one of this machine alone, which ends with the server; needs the extra cluster (Ray)",
        metavar="ADDRESS",
        bare="local",
        group=CLUSTER,
    )
    replicas: int = option(
        1, "engines of each model in the cluster (default: %(default)s)", minimum=1, metavar="N", group=CLUSTER
    )
    api_keys: Sequence[str] = option(
        (),
        "require one of these keys; repeatable. Every process of this machine can read command lines: better use "
        "the environment variable DSV4_API_KEY (comma-separated) or --api-key-file",
        flag="--api-key",
        metavar="KEY",
        group=ACCESS,
    )
    max_requests_per_key: int | None = option(
        None,
        "requests that a key may have open; more are answered 429 (default: no limit). A line of --api-key-file may "
        "have a key's own limits: KEY max_requests=N tokens_per_minute=N",
        unit="requests",
        minimum=1,
        metavar="N",
        group=ACCESS,
    )
    tokens_per_minute_per_key: int | None = option(
        None,
        "tokens of prompts and answers that a key may use per minute; then it is answered 429 (default: no limit)",
        unit="tokens",
        minimum=1,
        metavar="N",
        group=ACCESS,
    )
    share_prefixes: str = option(
        "all",
        "stored prefixes are shared by all requests, by those of one API key, or by those of one key and user id "
        "(default: %(default)s)",
        choices=SHARING,
        group=ACCESS,
    )
    retired_models: bool = option(
        False, "accept deepseek-chat and deepseek-reasoner, which the hosted service has retired", group=ACCESS
    )
    model_aliases: Sequence[str] = option(
        (), "a further id of the first model, like gpt-5; repeatable", flag="--model-alias", metavar="ID", group=ACCESS
    )
    allowed_hosts: Sequence[str] = option(
        (), "a further name of this server; repeatable", flag="--allowed-host", metavar="NAME", group=ACCESS
    )
    allowed_origins: Sequence[str] = option(
        (),
        "web pages of this origin, like https://chat.example, may use the server; repeatable",
        flag="--allowed-origin",
        metavar="ORIGIN",
        group=ACCESS,
    )
    response_store: str | None = option(
        None,
        "SQLite file that keeps stored responses (Responses API) when the server ends (default: they are in memory)",
        metavar="FILE",
        group=STORES,
    )
    response_store_bytes: int = option(
        MAX_BYTES,
        "bound on stored responses; 0 stores none (default: %(default)s)",
        unit="bytes",
        minimum=0,
        metavar="SIZE",
        group=STORES,
    )
    turn_memory_bytes: int = option(
        TURN_BYTES,
        "bound on the memory of the models' own turns, which later prompts repeat token for token, lost reasoning "
        "included; 0 remembers none (default: %(default)s)",
        unit="bytes",
        minimum=0,
        metavar="SIZE",
        group=STORES,
    )
    # Container runtimes kill a process 10 s after SIGTERM; Python takes up to 1 s to exit.
    grace_seconds: float = option(
        7.0,
        "seconds that open requests may take to finish after SIGTERM or Ctrl-C (default: %(default)g)",
        metavar="S",
        group=ACCESS,
    )
    client_seconds: float = option(
        60.0,
        "seconds that a client may take to send a request, or stop reading its answer (default: %(default)g)",
        metavar="S",
        group=ACCESS,
    )
    max_connections: int | None = option(
        None,
        "open connections (default: as many as the limit of open files allows, at most 4096)",
        metavar="N",
        group=ACCESS,
    )

    usage_db: str | None = option(
        None,
        "record the usage of every request, and its cost at DeepSeek's prices, in this SQLite file or in the database "
        "of a URL like postgresql://host/name (default: no record; see dsv4 usage)",
        metavar="FILE_OR_URL",
        group=STORES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        self._check_keys()
        self._check_process()
        if self.cluster is None:
            if self.replicas != 1:
                raise ValueError(f"replicas is {self.replicas}; allowed: 1, or more together with --cluster")
            return
        if self.cluster not in ("local", "auto") and not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", self.cluster):
            raise ValueError(f"cluster is {self.cluster!r}; allowed: {CLUSTERS}")
        if not self.engine_process:
            raise ValueError(f"cluster is {self.cluster!r} and engine_process False; allowed is one of them")

    def _check_keys(self) -> None:
        """ValueError for what holds for API keys, of which there are none: it would do nothing, unnoticed."""
        if self.api_keys:
            return
        for name in ("max_requests_per_key", "tokens_per_minute_per_key"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)} without API keys; allowed: None, or with api_keys")
        if self.share_prefixes == "key":
            raise ValueError("share_prefixes is 'key' without API keys; allowed: all, user, or with api_keys")

    def _check_process(self) -> None:
        """ValueError for what the server does with an engine process, where it has none."""
        where = "without an engine process" if not self.engine_process else "with a cluster" if self.cluster else None
        for name in ("max_crashes",) if self.engine_process else ("max_crashes", "stuck_seconds"):
            value, default = getattr(self, name), getattr(ServerConfig, name)
            if where is not None and value != default:
                raise ValueError(f"{name} is {value} {where}, where it does nothing; allowed there: {default:g}")
