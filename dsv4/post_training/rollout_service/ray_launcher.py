"""Rollout workers as Ray actors, on this machine or any of a cluster that sees the run's folder."""

from __future__ import annotations

from typing import Any

from dsv4.engine.cluster.connection import Cluster
from dsv4.post_training.rollout_service.process import WorkerPlan, work


class RolloutActor:
    """A worker in a process of Ray's. Ray ends it with the job that started it."""

    def work(self, plan: WorkerPlan) -> None:
        """Work until the actor is killed."""
        work(plan)


class LaunchedActor:
    """A started actor, as its learner sees it."""

    def __init__(self, ray: Any, actor: Any, plan: WorkerPlan) -> None:
        self._ray, self._actor, self._call = ray, actor, actor.work.remote(plan)

    def ended(self) -> str | None:
        done, _ = self._ray.wait([self._call], timeout=0)
        if not done:
            return None
        try:
            self._ray.get(self._call)
        except self._ray.exceptions.RayError as error:  # of the actor's own code, or of the loss of its process
            words = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            own = isinstance(error, self._ray.exceptions.RayTaskError)
            return f"ended: {words[-1] if own else words[0]}"
        return "ended"

    def kill(self) -> None:
        self._ray.kill(self._actor)


class RayLauncher:
    """Starts workers as actors of the cluster at `address`, each with `threads` processors, and a GPU if `on_gpu`.

    `address`: host:port, "auto", or "local" for a new cluster of this machine. ClusterError where it cannot be used.
    The database of the queue and the folder of the weights must be reachable from all machines of the cluster.
    """

    def __init__(self, address: str, workers: int, threads: int, on_gpu: bool = False) -> None:
        self._cluster = Cluster(address, workers * threads, serve=False).hold()
        self._options = {"num_cpus": threads, "num_gpus": int(on_gpu), "max_restarts": 0}

    def start(self, plan: WorkerPlan, place: int) -> LaunchedActor:
        ray = self._cluster.ray
        return LaunchedActor(ray, ray.remote(**self._options)(RolloutActor).remote(), plan)

    def close(self) -> None:
        """End the connection, and a cluster of this process with it."""
        self._cluster.let_go()
