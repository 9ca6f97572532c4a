"""Cluster: a Ray cluster on this machine alone, or the part of another one that this server uses."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dsv4
from dsv4.engine.cluster.library import ClusterError, ray_module
from dsv4.engine.config import EngineConfig

if TYPE_CHECKING:
    from dsv4.engine.llm import LLM

LOCAL = "local"
OBJECT_STORE_BYTES = 100 << 20  # events are small, and go without it
DEPLOYMENT = "engine"
_ANSWER_SECONDS = 5.0  # that a wrong address costs
_HEALTH_SECONDS = 2.0  # between two looks of Ray at a replica
_STATS_SECONDS = 2.0  # between two reports of a replica about its prefixes
_SIGACTION_BYTES = 512  # room for the C structure of any system
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}

logger = logging.getLogger("dsv4.engine")


@dataclass(frozen=True)
class ReplicaPlan:
    """Replicas of one model. `make`: returns the LLM, in a replica's process; a function of a module, or a partial."""

    name: str
    make: Callable[[], LLM]
    config: EngineConfig
    num_replicas: int
    threads: int  # of a replica
    compile_seconds: float = 10.0
    stuck_seconds: float = 0.0


class Cluster:
    """A connection to a cluster, the only one of this process. It ends when all who hold it have let it go.

    ClusterError if Ray is not installed, nothing answers, or this machine is no part of the cluster.
    """

    def __init__(self, address: str, num_cpus: int, serve: bool = True) -> None:
        """`address`: host:port, "auto" for the cluster that runs on this machine, or "local" for a new one of it with
        `num_cpus`, which ends with this process. `serve`: start Ray Serve, which replicas need."""
        self.is_local = address == LOCAL
        self._holders = 0
        self._lock = threading.Lock()
        self.ray = ray_module("ray", self.is_local)
        self._serve = ray_module("ray.serve") if serve else None
        self._ended = threading.Event()
        if not self.is_local:
            _check_answers(address)
        connected: Future[None] = Future()
        # Ray's processes die with the thread that started them: this one lives as long as the connection.
        self._thread = threading.Thread(
            target=self._run, args=(connected, address, num_cpus), name="dsv4-ray", daemon=True
        )
        self._thread.start()
        try:
            connected.result()
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(f"the Ray cluster {address!r} cannot be used: {error}") from error

    def _run(self, connected: Future[None], address: str, num_cpus: int) -> None:
        try:
            self._connect(address, num_cpus)
        except BaseException as error:
            self.ray.shutdown()
            connected.set_exception(error)
            return
        connected.set_result(None)
        self._ended.wait()
        self.ray.shutdown()

    def _connect(self, address: str, num_cpus: int) -> None:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        options: dict[str, Any] = {"address": address}
        if self.is_local:
            options |= {
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "runtime_env": {"env_vars": {"PYTHONPATH": _python_path()}},
            }
        with _kept_handler(signal.SIGTERM):
            self.ray.init(**options, configure_logging=False)
        if self._serve is not None:
            self._serve.start(proxy_location="Disabled", logging_config=_LOGGING)

    def hold(self) -> Cluster:
        with self._lock:
            self._holders += 1
        return self

    def let_go(self) -> None:
        """Ends the connection after the last holder, and with it a cluster of this process."""
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._ended.set()
            self._thread.join()

    def share(self, num_engines: int) -> int:
        """CPUs of each of several engines if they have the whole cluster; at least 1, at most those of any machine."""
        nodes: list[dict[str, Any]] = self.ray.nodes()
        cpus = [node["Resources"].get("CPU", 0.0) for node in nodes if node["Alive"]]
        smallest = min((count for count in cpus if count), default=1.0)
        return max(1, int(min(sum(cpus) // num_engines, smallest)))

    def deploy(self, plan: ReplicaPlan) -> Any:
        """Starts replicas and waits until they have loaded the model, or tried to; returns Ray Serve's handle.

        Takes over the replicas that a server which was killed has left. ClusterError if Ray does not start them.
        """
        assert self._serve is not None, "this connection is for actors alone"
        config, router = plan.config, ray_module("dsv4.engine.cluster.router").PrefixRouter
        on_gpu = config.device.startswith("cuda")
        routing = ray_module("ray.serve.config").RequestRouterConfig(
            request_router_class=router,
            request_router_kwargs={"max_imbalance": max(1, config.max_num_seqs // 2)},
            request_routing_stats_period_s=_STATS_SECONDS,
        )
        deployment = self._serve.deployment(
            ray_module("dsv4.engine.cluster.replica").EngineReplica,
            name=DEPLOYMENT,
            num_replicas=plan.num_replicas,
            ray_actor_options={"num_cpus": plan.threads, "num_gpus": int(on_gpu)},
            # The engine's own bounds refuse requests; Ray would let them wait without an end.
            max_ongoing_requests=2 * (config.max_num_seqs + config.max_num_waiting),
            health_check_period_s=_HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=1.0,
            request_router_config=routing,
        )
        self._warn_of_room(plan, on_gpu)
        try:
            application = deployment.bind(plan.make, plan.compile_seconds, plan.stuck_seconds)
            return self._serve.run(
                application, name=application_name(plan.name), route_prefix=None, logging_config=_LOGGING
            )
        except RuntimeError as error:
            self.remove(plan.name)
            raise ClusterError(f"the replicas of {plan.name} cannot be started: {error}") from error

    def remove(self, name: str) -> None:
        """Ends the replicas of a model; with the last holder of a cluster of this process the cluster ends them."""
        if self._serve is not None and not (self.is_local and self._holders <= 1):
            self._serve.delete(application_name(name), _blocking=False)

    def _warn_of_room(self, plan: ReplicaPlan, on_gpu: bool) -> None:
        there: dict[str, float] = self.ray.cluster_resources()
        wanted = {"CPU": plan.num_replicas * plan.threads, "GPU": plan.num_replicas * int(on_gpu)}
        for kind, number in wanted.items():
            if number > there.get(kind, 0):
                text = "the replicas of %s need %d %ss, the cluster has %d: they wait until it has grown"
                logger.warning(text, plan.name, number, kind, there.get(kind, 0))


def application_name(model: str) -> str:
    """Ray Serve's name of a model's replicas."""
    return f"dsv4-{re.sub(r'[^A-Za-z0-9_.-]', '-', model)}"


def _check_answers(address: str) -> None:
    """ClusterError unless something listens there: Ray itself would try for a long time, and end the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}; ray start --head prints one's") from error


@contextlib.contextmanager
def _kept_handler(number: signal.Signals) -> Generator[None]:
    """Puts back the handler of a signal at the end: Ray's prints a stack. Python does so in its main thread only."""
    library = ctypes.CDLL(None)
    kept = ctypes.create_string_buffer(_SIGACTION_BYTES)
    known = library.sigaction(int(number), None, kept) == 0
    try:
        yield
    finally:
        if known:
            library.sigaction(int(number), kept, None)


def _python_path() -> str:
    """Folders of this package for processes of Ray on this machine."""
    paths = [str(Path(dsv4.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)
