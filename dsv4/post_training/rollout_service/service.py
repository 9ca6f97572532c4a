"""The rollout service as a learner sees it: workers that are kept alive, published weights, answers from the queue."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dsv4.checkpoint.atomic import new_file
from dsv4.model.transformer import Transformer
from dsv4.post_training.rollout_service.launchers import Launched, Launcher
from dsv4.post_training.rollout_service.process import WorkerPlan
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.records import Finished, NewRequest
from dsv4.post_training.rollout_service.tables import ServiceError
from dsv4.post_training.rollout_service.weights import PublishedWeights
from dsv4.tokenizer.prompts import PromptEncoder

TICK_SECONDS = 0.05  # between two looks at the workers, and at the queue while someone waits
LOOK_SECONDS = 5.0  # between two looks for silent workers


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Workers of a run, and its patience with them."""

    workers: int
    max_staleness: int = 0  # in updates of the workers' weights, one per step; 0: synchronous
    max_deaths: int = 10  # of workers, without a token in between
    silence_seconds: float = 600.0  # without a token from any worker while the learner waits

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("max_staleness", 0), ("max_deaths", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"service.{name} is {getattr(self, name)}; allowed: {least} or more")
        if not self.silence_seconds > 0.0:
            raise ValueError(f"service.silence_seconds is {self.silence_seconds}; allowed: more than 0")


class RolloutService:
    """Workers on a queue of this run. Use `running` around all else.

    `plan` is that of every worker; its name is replaced by each one's own. A worker that ends is started again, one
    that is silent for longer than its leases is ended first. ServiceError, in words, from whatever waits, if workers
    end `max_deaths` times without a token in between, none writes a token for `silence_seconds`, or the queue does not
    answer.
    """

    def __init__(self, plan: WorkerPlan, settings: ServiceSettings, launcher: Launcher, console: Console) -> None:
        self.settings, self.prompts = settings, PromptEncoder.from_pretrained(Path(plan.model))
        self.max_model_len = plan.max_model_len
        self.queue = RolloutQueue(plan.url, plan.lease_seconds, plan.max_stalled, run=plan.run)
        self.version = -1  # that was published last
        self.num_deaths = 0
        self._plan, self._launcher, self._console = plan, launcher, console
        self._weights = PublishedWeights(Path(plan.weights))
        self._workers: dict[str, tuple[int, Launched]] = {}
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._ended: set[int] = set()
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._silence = _Silence()

    def set_options(self, **options: Any) -> None:
        """Change the plan of the workers that are started from now on."""
        self._plan = replace(self._plan, **options)

    @contextmanager
    def running(self, first: int, version: int) -> Generator[None]:
        """Context in which the workers work. The run goes on with problem `first` and the weights `version`.

        Requests of earlier problems are forgotten, as are later weights, those of before the run was taken back to its
        saved state, and every token that they drew: the run gives their versions to other weights. Requests go on from
        what is left of their logs.
        """
        # First of all: workers of a killed learner may live for a moment, and take requests with lost weights.
        self._plan = replace(self._plan, learner=self.queue.new_learner())
        self._weights.keep(version)
        self.queue.release()  # from now on nobody writes to what is removed
        self.queue.keep(first)
        self.queue.take_back(version)
        watcher = threading.Thread(target=self._watch, name="dsv4-rollout-service", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._closing.set()
            watcher.join()
            for _, worker in self._workers.values():
                worker.kill()
            self._fail(ServiceError("the rollout service has ended"))
            self._launcher.close()
            self.queue.close()

    def publish(self, version: int, model: Transformer) -> None:
        """Give the workers new weights; what is asked from now on begins with these, or later ones."""
        self._weights.publish(version, model)
        self.version = version

    def ask(self, batch: int, requests: Sequence[NewRequest], problem: int, version: int) -> list[Finished]:
        """Answers to requests, in their order; waits for them. A batch that is in the queue already goes on."""
        if not self.queue.known(batch):
            self.queue.add(batch, requests, problem, version)
        with self._changed:
            self._waiting.add(batch)
            while batch not in self._ended:
                if self._error is not None:
                    raise self._error
                self._changed.wait(1.0)
            self._ended.discard(batch)
        return self.queue.finished(batch)

    def processes(self) -> list[Launched]:
        """The workers of now."""
        return [worker for _, worker in list(self._workers.values())]

    def _watch(self) -> None:
        try:
            for place in range(self.settings.workers):
                self._start(place)
            while not self._closing.wait(TICK_SECONDS):
                self._look_at_workers()
                self._look_at_queue()
        except Exception as error:  # whoever waits raises it
            self._fail(error)

    def _start(self, place: int) -> None:
        name = f"{place}-{uuid.uuid4().hex[:8]}"
        self._workers[name] = (place, self._launcher.start(replace(self._plan, name=name), place))

    def _look_at_workers(self) -> None:
        for name, (place, worker) in list(self._workers.items()):
            how = worker.ended()
            if how is None:
                continue
            del self._workers[name]
            self.num_deaths += 1
            deaths = self._silence.death(self.queue.num_tokens())
            if deaths >= self.settings.max_deaths:
                raise ServiceError(
                    f"rollout workers have ended {deaths} times without a token in between; the last {how}"
                )
            self._console.print(f"rollout worker {place} {how}; it is started again", highlight=False)
            self.queue.release(name)
            self._start(place)

    def _look_at_queue(self) -> None:
        with self._changed:
            waiting = set(self._waiting)
        if not waiting:
            self._silence.quiet()
            return
        ended = waiting - self.queue.open_batches()
        with self._changed:
            self._waiting -= ended
            self._ended |= ended
            if ended:
                self._changed.notify_all()
        if not self._silence.due():
            return
        for name in self.queue.silent_workers() & set(self._workers):
            place, worker = self._workers[name]
            self._console.print(
                f"rollout worker {place} was silent for {self._plan.lease_seconds:g} s and is ended", highlight=False
            )
            worker.kill()
        silent = self._silence.look(self.queue.num_tokens())
        if silent > self.settings.silence_seconds:
            raise ServiceError(
                f"no rollout worker has written a token for {silent:.0f} s; the queue is {self.queue.place}"
            )

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class _Silence:
    """Time, and ends of workers, since the log last changed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._tokens, self._deaths = clock, -1, 0
        self._since = self._next = clock()

    def death(self, tokens: int) -> int:
        """Ends of workers without a token in between, with this one."""
        self.look(tokens)
        self._deaths += 1
        return self._deaths

    def due(self) -> bool:
        """True once per LOOK_SECONDS."""
        if self._clock() < self._next:
            return False
        self._next = self._clock() + LOOK_SECONDS
        return True

    def look(self, tokens: int) -> float:
        """Seconds without a change of the number of logged tokens."""
        if tokens != self._tokens:
            self._tokens, self._deaths = tokens, 0
            self._since = self._clock()
        return self._clock() - self._since

    def quiet(self) -> None:
        """Nobody waits."""
        self._since = self._clock()


def run_name(folder: Path) -> str:
    """Name of a run, unique among those that share a database; noted in its folder."""
    path = folder / "run"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def worker_threads(workers: int) -> int:
    """Threads per worker that share this machine's processors."""
    return max(1, len(os.sched_getaffinity(0)) // workers if hasattr(os, "sched_getaffinity") else 1)
