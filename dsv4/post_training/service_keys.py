"""Keys of the rollout service in recipes, with their defaults (reasons: docs/post-training.md)."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator
from rich.console import Console

from dsv4.post_training.key_types import Count, Unbounded, Whole
from dsv4.post_training.rollout_service.launchers import LauncherName, ProcessLauncher
from dsv4.post_training.rollout_service.process import WorkerPlan
from dsv4.post_training.rollout_service.queue import LEASE_SECONDS, MAX_STALLED
from dsv4.post_training.rollout_service.service import RolloutService, ServiceSettings, run_name, worker_threads
from dsv4.post_training.run_keys import RunSection, SamplingSection
from dsv4.training.recipe import Section, changed_keys


class ServiceSection(Section):
    """Sampling by workers in processes of their own, from a durable queue; without workers, the run's own engine.

    `sampling.max_num_seqs` is of each worker.
    """

    workers: Whole = 0
    url: str | None = None  # of the queue's database; left out: an SQLite file in the run's folder
    max_staleness: Whole = ServiceSettings.max_staleness  # updates of the workers' weights; 0: synchronous
    launcher: LauncherName = "process"
    address: str = "local"  # of the Ray cluster
    threads: Whole = 0  # of a worker; 0: this machine's processors shared among them
    lease_seconds: Unbounded = LEASE_SECONDS  # that a worker may be silent
    silence_seconds: Unbounded = ServiceSettings.silence_seconds  # that the learner waits for a token of any worker
    max_deaths: Count = ServiceSettings.max_deaths  # of workers, without a token in between

    @model_validator(mode="after")
    def _check(self) -> ServiceSection:
        if not self.workers and (given := changed_keys(self)):
            value = getattr(self, given[0])
            raise ValueError(f"{given[0]} is {value} without workers; allowed: left out, or workers above 0")
        return self

    def service(
        self, run: RunSection, sampling: SamplingSection, folder: Path, run_dir: Path, console: Console
    ) -> RolloutService | None:
        """The service of a run of the model in `folder`; None without workers. ServiceError for a queue that cannot be
        used, ClusterError for a Ray cluster."""
        if not self.workers:
            return None
        place = (run_dir / "service").absolute()
        plan = WorkerPlan(
            run=run_name(place), url=self.url or f"sqlite:///{place / 'queue.db'}", weights=str(place / "weights"),
            model=str(folder), numerics=run.numerics, quantized=run.quantized, device=run.device,
            max_num_seqs=sampling.max_num_seqs, max_model_len=sampling.max_model_len, lease_seconds=self.lease_seconds,
            max_stalled=MAX_STALLED, workers=self.workers, silence_seconds=self.silence_seconds,
        )  # fmt: skip
        threads = self.threads or worker_threads(self.workers)
        settings = ServiceSettings(
            workers=self.workers, max_staleness=self.max_staleness, max_deaths=self.max_deaths,
            silence_seconds=self.silence_seconds,
        )  # fmt: skip
        launcher = ProcessLauncher(place, threads)
        if self.launcher == "ray":
            from dsv4.post_training.rollout_service.ray_launcher import RayLauncher

            launcher = RayLauncher(self.address, self.workers, threads, run.device.startswith("cuda"))
        return RolloutService(plan, settings, launcher, console)
