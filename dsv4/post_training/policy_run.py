"""A run that alternates sampling and updates: its loop, its state on disk; a killed run resumes to the same bits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsv4.checkpoint.atomic import clear_folder
from dsv4.post_training.episodes.sessions import SessionLogs
from dsv4.post_training.problems import Problem, ProblemSource
from dsv4.post_training.rollout_service.sampler import ServiceSampler
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.rollouts import Sampler
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.updates import TrainServeError
from dsv4.training.memory import keep_freed_memory
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import UNPLANNED, FixedPlan, Plan, TimePlan
from dsv4.training.report import Report
from dsv4.training.schedule import Schedule
from dsv4.training.speed import peak_memory
from dsv4.training.state import load_state, save_state
from dsv4.training.stopping import StopOnSignal

STATE = "state.pt"
CALIBRATION_STEPS = 4  # of a budget of time: a step here samples, which takes as long as many of pre-training


@dataclass(frozen=True)
class LoopSettings:
    """Length of a run, its rate, and what a step samples. `seconds`: a budget of time in place of `steps`.

    `max_difference`: of a sampled token's log-probability, training against engine, past which the run stops.
    """

    steps: int
    schedule: Schedule
    prompts: int = 16  # per step
    max_tokens: int = 512  # of an answer
    _: KW_ONLY
    save_every: int = 10
    seed: int = 1
    seconds: float | None = None
    max_difference: float | None = None  # None: it is logged alone

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "max_tokens", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


@dataclass
class PolicyPosition:
    """Position of a run."""

    step: int = 0
    problems: int = 0  # that were asked
    tokens: int = 0  # that were sampled
    seconds: float = 0.0


@dataclass(frozen=True)
class StepFigures:
    """A step's figures for the log, the tokens that it sampled, and those that the forwards of its updates saw.

    These are prompts, answers and tools' results of the documents that were trained on.
    """

    figures: dict[str, Any]
    tokens: int
    trained_tokens: int


class PolicyRun(ABC):
    """Trains a served policy on problems. `run_dir` keeps state and metrics; a state found there is resumed.

    `service`: samples, in place of an engine of this process.
    """

    stage: str  # in the log

    def __init__(
        self,
        policy: ServedPolicy,
        optimizer: MuonAdamW,
        problems: ProblemSource,
        loop: LoopSettings,
        run_dir: Path,
        console: Console | None = None,
        quiet: bool = False,
        service: RolloutService | None = None,
    ) -> None:
        self.policy, self.optimizer, self.problems, self.loop = policy, optimizer, problems, loop
        self.run_dir, self.console, self.quiet, self.service = run_dir, console or Console(), quiet, service
        self.position = PolicyPosition()
        self.sessions = SessionLogs(run_dir / "sessions")
        run_dir.mkdir(parents=True, exist_ok=True)
        clear_folder(run_dir)
        self.plan: Plan = FixedPlan(loop.steps)
        if loop.seconds is not None:
            self.plan = TimePlan(run_dir / "plan.json", loop.seconds, calibration=CALIBRATION_STEPS)
        if self.state_path.exists():
            self.position = load_state(self.state_path, policy.model, optimizer, PolicyPosition)

    @abstractmethod
    def step(self, rate: float) -> StepFigures:
        """Sample and update once, at learning rate `rate`."""

    @property
    def state_path(self) -> Path:
        return self.run_dir / STATE

    def run(self, stop_after: int | None = None) -> PolicyPosition:
        """Train to the last step, or until `stop_after` steps are done; saves the state at the end.

        RunStoppedError, with the state saved, if the process got SIGTERM or Ctrl-C meanwhile.
        """
        with self._working():
            return self._steps(stop_after)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Context of all steps, in which workers of a service work."""
        service, position = self.service, self.position
        with nullcontext() if service is None else service.running(position.problems, position.step):
            yield

    def _steps(self, stop_after: int | None) -> PolicyPosition:
        loop, position = self.loop, self.position
        metrics = self.run_dir / "metrics.jsonl"
        keep_freed_memory()
        with Report(metrics, position.step, self.console, self.quiet) as report, StopOnSignal() as stop:
            while not self.finished and not stop.requested and (stop_after is None or position.step < stop_after):
                self._logged_step(report)
                if position.step % loop.save_every == 0:
                    self.save()
        self.save()
        if stop.requested and not self.finished:
            raise stop.error(position.step, self._total, self.state_path)
        return position

    @property
    def finished(self) -> bool:
        return self.position.step >= self._total

    @property
    def _total(self) -> int:
        """Steps of the run as planned now."""
        return self.plan.total(self.position.step)

    def save(self) -> None:
        """Write the state, behind which the run goes on; then remove what it no longer asks for again."""
        save_state(self.state_path, self.policy.model, self.optimizer, self.position)
        self.sessions.keep(self.position.problems)
        if self.service is not None:
            self.service.queue.keep(self.position.problems)

    @contextmanager
    def _sampling(self) -> Iterator[Callable[[int], Sampler]]:
        """Context in which problems are asked: gives the sampler of a call of problems, by the number of the first."""
        service, model = self.service, self.policy.model
        if service is None:
            with self.policy.serving() as llm:
                yield lambda first: llm
            return
        service.publish(self.position.step, model)
        yield lambda first: ServiceSampler(service, model.config, first)

    def take_problems(self, llm: Sampler, count: int) -> tuple[int, list[Problem], list[list[int]]]:
        """The next `count` problems: the number of the first, the problems, their prompts as token ids."""
        first = self.position.problems
        self.position.problems += count
        return first, *self.problems_from(llm, first, count)

    def problems_from(self, sampler: Sampler, first: int, count: int) -> tuple[list[Problem], list[list[int]]]:
        """`count` problems from number `first` on, and their prompts as token ids."""
        assert sampler.prompts is not None, "problems are asked in text"
        problems = [self.problems.problem(number) for number in range(first, first + count)]
        return problems, [sampler.prompts.encode(problem.prompt()) for problem in problems]

    def _logged_step(self, report: Report) -> None:
        loop, position = self.loop, self.position
        started, step = time.perf_counter(), position.step
        rate = loop.schedule.rate(step, self._total)
        done = self.step(rate)
        took = time.perf_counter() - started
        position.step, position.tokens, position.seconds = (
            step + 1,
            position.tokens + done.tokens,
            position.seconds + took,
        )
        self.plan.observe(position.step, position.seconds, freeze=loop.schedule.in_decay(step, self._total))
        metrics = {
            "step": step, "stage": self.stage, "lr": rate, "tokens": position.tokens,
            "trained_tokens": done.trained_tokens, "seconds": round(position.seconds, 3),
            "tokens_per_second": done.tokens / took, "peak_memory_bytes": peak_memory(self.policy.model.device),
        } | done.figures  # fmt: skip
        report.step(metrics, self._total, self._total < UNPLANNED)
        self._check_difference(done.figures.get("train_serve_difference", 0.0))

    def _check_difference(self, found: float) -> None:
        allowed = self.loop.max_difference
        if allowed is not None and not found <= allowed:
            raise TrainServeError(
                f"the train_serve_difference of step {self.position.step - 1} is {found:.3g}; allowed by "
                f"run.max_difference: {allowed:g} at most. The run stands at its last saved state, before the step; a "
                f"larger value in its recipe.toml lets --resume go on"
            )
