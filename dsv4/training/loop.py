"""The training loop: data stages, optimizer, router balancing, checkpoints; a resumed run has the same bits."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from rich.console import Console

from dsv4.analysis.activations import POLICIES, Recompute
from dsv4.analysis.precision import PRECISIONS, Precision
from dsv4.checkpoint.atomic import clear_folder
from dsv4.kernels.stored import StoredWeight
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.balance import clamped_shares, load_imbalance, update_router_biases
from dsv4.training.batch_size import BatchSize
from dsv4.training.gradient import BatchSource, Result, Work, sum_results
from dsv4.training.handover import KEPT, STATE, take_checkpoint
from dsv4.training.kept_states import KeptStates
from dsv4.training.losses import LossWeights, not_finite
from dsv4.training.memory import keep_freed_memory
from dsv4.training.optim import MuonAdamW
from dsv4.training.plan import UNPLANNED, Plan
from dsv4.training.processes import Processes
from dsv4.training.replicas import Replicas
from dsv4.training.report import Report
from dsv4.training.schedule import Schedule
from dsv4.training.speed import SpeedMeter
from dsv4.training.spikes import Spike
from dsv4.training.stability import Kept, Stability, describe_rollback
from dsv4.training.stability_settings import StabilitySettings
from dsv4.training.state import RunPosition, StateError, load_state, save_state
from dsv4.training.stopping import StopOnSignal

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer


@dataclass(frozen=True)
class Stage:
    """A part of the run: a fraction `share` of all steps, on batches of `source`."""

    name: str
    share: float
    source: BatchSource
    attention: AttentionPhase = "sparse"
    size: BatchSize | None = None  # of a batch; None: TrainSettings.micro_batches
    rate: float | None = None  # constant learning rate; None: the run's schedule
    recompute: Recompute | None = None  # None: TrainSettings.recompute


@dataclass(frozen=True)
class TrainSettings:
    """Training hyperparameters. Defaults: the DeepSeek-V4 report's where it gives a value."""

    schedule: Schedule
    grad_clip: float = 1.0
    loss_weights: LossWeights = field(default_factory=LossWeights)
    mtp_weight_in_decay: float = 0.1  # MTP weight in the decay, capped at loss_weights.mtp
    balance_speed: float = 1e-3
    quantized_share: float = 0.0  # last fraction of the run, trained with the stored (FP4, FP8) weight values
    save_every: int = 100  # steps
    precision: Precision = "fp32"  # of the products of layers and experts: kernels/precision.py
    recompute: Recompute = "none"  # activation checkpointing: recompute.py
    count_clamps: bool = False  # share of values that the SwiGLU clamp changes, per layer, in the metrics
    stability: StabilitySettings | None = None  # spike detector and rollbacks; None: without
    replicas: int = 1  # data-parallel processes
    micro_batches: int = 1  # per process and step, one after the other
    threads: int = 1  # per process if replicas > 1

    def __post_init__(self) -> None:
        for name in ("save_every", "replicas", "micro_batches", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if not 0.0 <= self.quantized_share <= 1.0:
            raise ValueError(f"quantized_share is {self.quantized_share}; allowed: 0 to 1")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip is {self.grad_clip}; allowed: more than 0")
        if self.recompute not in POLICIES:
            raise ValueError(f"recompute is {self.recompute!r}; allowed: {', '.join(POLICIES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}")


class NonFiniteLossError(RuntimeError):
    """A loss, a gradient or a parameter is not finite."""


class StepOptimizer(Protocol):
    """Methods of an optimizer that the loop itself calls; `Processes.update` steps it."""

    def gradient_norm(self) -> float: ...

    def not_finite(self) -> list[str]: ...

    def zero_grad(self) -> None: ...


OptimizerKind = TypeVar("OptimizerKind", bound=StepOptimizer)


class TrainingLoop(ABC, Generic[OptimizerKind]):
    """Trains `model` through `stages`. `run_dir` keeps state, plan and metrics; a state found there is resumed.

    Of one process (`Trainer`) or of one of several ranks (rank_loop.py), which keep their states each in their own way.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerKind,
        stages: Sequence[Stage],
        settings: TrainSettings,
        plan: Plan,
        run_dir: Path,
        console: Console | None = None,
        quiet: bool = False,
        speed: SpeedMeter | None = None,
        tensorboard: bool = False,
    ) -> None:
        if not stages or not math.isclose(sum(stage.share for stage in stages), 1.0):
            raise ValueError(f"the shares of the stages must add up to 1; got {[stage.share for stage in stages]}")
        self.model, self.optimizer, self.stages, self.settings = model, optimizer, stages, settings
        self.plan, self.run_dir, self.console, self.quiet = plan, run_dir, console, quiet
        self.speed, self.tensorboard = speed, tensorboard
        self.progress = RunPosition()
        run_dir.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.stability: Stability | None = None
        if settings.stability is not None:
            self.stability = Stability(settings.stability, self._kept(settings.stability.keep), self.progress.stability)

    @abstractmethod
    def _kept(self, count: int) -> Kept:
        """The last `count` states to roll back to."""

    @abstractmethod
    def _go_back(self, path: Path) -> None:
        """Take the state in `path` in place of the present one."""

    @abstractmethod
    def _resume(self) -> None:
        """Go on from the state in the run's folder, if there is one."""

    @abstractmethod
    def _processes(self) -> Processes:
        """The processes that compute the run's steps."""

    @abstractmethod
    def save(self) -> None:
        """Write the whole state of the run. NonFiniteLossError, with nothing written, if a parameter is not finite."""

    @property
    @abstractmethod
    def state_path(self) -> Path:
        """File or folder of the last saved state."""

    def _check_stage(self, path: Path) -> None:
        if self.progress.stage >= len(self.stages):
            raise StateError(f"{path} is in stage {self.progress.stage}; the run has {len(self.stages)}")

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.plan.total(self.progress.step)

    def run(self, stop_after: int | None = None) -> RunPosition:
        """Train to the end of the plan, or until `stop_after` steps of the run are done; saves the state at the end.

        RunStoppedError, with the state saved, if the process got SIGTERM or Ctrl-C meanwhile.
        """
        keep_freed_memory()
        with self._report() as report, self._processes() as replicas, self._stop() as stop:
            if self.stability and self.progress.step not in self.stability.kept.steps():
                self.save()  # a state to go back to; kept before, unless this is a new run or one killed while saving
            while not (self.finished or self._stops(stop)) and (stop_after is None or self.progress.step < stop_after):
                self._one_step(report, replicas)
                if self.progress.step % self.settings.save_every == 0:
                    self.save()
            self._save_last()
        if stop.requested and not self.finished:
            step = self.progress.step
            raise stop.error(step, self.plan.total(step), self.state_path)
        return self.progress

    def _report(self) -> Report:
        return Report(
            self.run_dir / "metrics.jsonl",
            self.progress.step,
            self.console,
            quiet=self.quiet,
            tensorboard=self.tensorboard,
            attempt=self.stability.rollbacks if self.stability else 0,
        )

    def _stop(self) -> StopOnSignal:
        return StopOnSignal()

    def _stops(self, stop: StopOnSignal) -> bool:
        """True if the run is to end before its next step."""
        return stop.requested

    def _save_last(self) -> None:
        """Save as the run ends, before its signal handlers go."""
        self.save()

    def _one_step(self, report: Report, replicas: Processes) -> None:
        started = time.perf_counter()
        progress, settings = self.progress, self.settings
        step, total = progress.step, self.plan.total(progress.step)
        progress.stage, progress.stage_start = self._stage_at(step, total)
        stage = self.stages[progress.stage]
        work = self._work(step, total)
        make_work = partial(self._work, total=total)
        ahead = self.stability.route_ahead(range(step, total), make_work, replicas) if self.stability else {}
        seconds_ahead = time.perf_counter() - started
        results = replicas.gradient(replace(work, routing=ahead))
        result, norm = sum_results(results), self.optimizer.gradient_norm()
        losses, loads, tokens = result.losses, result.loads, result.tokens
        if self.stability:
            spike = self.stability.observe(step, [progress.stage, work.quantized], losses.next_token, norm)
            if spike and self._roll_back(self.stability, spike, report, time.perf_counter() - started):
                return
        self._check_finite(results, norm)
        rate = settings.schedule.rate(step, total) if stage.rate is None else stage.rate
        replicas.update(rate, min(1.0, settings.grad_clip / (norm + 1e-6)), stage.attention)
        self.optimizer.zero_grad()
        if stage.attention != "warmup":
            update_router_biases(self.model, loads, settings.balance_speed)

        took = time.perf_counter() - started
        progress.step, progress.tokens, progress.seconds = step + 1, progress.tokens + tokens, progress.seconds + took
        self.plan.observe(progress.step, progress.seconds, freeze=settings.schedule.in_decay(step, total))
        metrics = {
            "step": step, "stage": stage.name, "loss": losses.next_token, "accuracy": losses.accuracy,
            "mtp_loss": losses.mtp, "balance_loss": losses.balance, "indexer_loss": losses.indexer,
            "lr": rate, "grad_norm": norm, "imbalance": load_imbalance(loads), "targets": losses.targets,
            "tokens": progress.tokens, "seconds": round(progress.seconds, 3), "tokens_per_second": tokens / took,
        }  # fmt: skip
        if self.speed is not None:
            metrics |= self.speed.measure(result.lengths, stage.attention, work.weights.mtp > 0, took)
        if self.stability:
            metrics |= {"attempt": self.stability.rollbacks, "anticipatory": bool(ahead)}
            metrics |= {"anticipation_seconds": round(seconds_ahead, 3)} if ahead else {}
        if settings.count_clamps:
            metrics["clamped"] = clamped_shares(result.clamps)
        total = self.plan.total(progress.step)
        report.step(metrics, total, total < UNPLANNED)

    def _work(self, step: int, total: int) -> Work:
        """Forward and backward of this or a later step."""
        settings, (number, start) = self.settings, self._stage_at(step, total)
        stage = self.stages[number]
        weights = settings.loss_weights
        if settings.schedule.in_decay(step, total):
            weights = replace(weights, mtp=min(weights.mtp, settings.mtp_weight_in_decay))
        quantized = step >= total * (1 - settings.quantized_share)
        return Work(
            number, step - start, weights, quantized, settings.precision, stage.attention, stage.size,
            settings.count_clamps, settings.recompute if stage.recompute is None else stage.recompute,
        )  # fmt: skip

    def _roll_back(self, stability: Stability, spike: Spike, report: Report, took: float) -> bool:
        """Go back to a state before the spike, without an update; False if the run is to go on as it is."""
        path = stability.choose(spike)
        if path is None:
            return False
        seconds, attempt = self.progress.seconds + took, stability.rollbacks
        self.optimizer.zero_grad()
        self._go_back(path)
        self.progress.seconds = seconds  # a budget of time goes on
        step = self.progress.step
        stability.went_back(spike, step, self.progress.stability)
        report.event(
            describe_rollback(spike, attempt, step) | {"anticipatory_until": stability.until},
            f"spike at step {spike.step} ({spike.statistic} {spike.value:.4g}, limit {spike.limit:.4g}): back to step "
            f"{step}",
        )
        self.save()
        return True

    def _check_finite(self, results: Sequence[Result], norm: float) -> None:
        """Raise NonFiniteLossError naming the losses, else the gradients, that are not finite."""
        parts = [(rank, not_finite(result.losses)) for rank, result in enumerate(results)]
        wrong = [f"{', '.join(names)} (replica {rank})" for rank, names in parts if names]
        if not wrong and math.isfinite(norm):
            return
        if not wrong:
            wrong = [f"gradient norm {norm}", *self.optimizer.not_finite()]
        raise NonFiniteLossError(
            f"step {self.progress.step}, stage {self.stages[self.progress.stage].name}: {'; '.join(wrong)}; nothing "
            f"was updated, {self._last_state()}"
        )

    def _last_state(self) -> str:
        return f"the last saved state is {self.state_path}" if self.state_path.exists() else "no state was saved yet"

    def _stage_at(self, step: int, total: int) -> tuple[int, int]:
        """Stage of this or a later step, and the stage's first step.

        A stage begins once the earlier ones have had their share of `total`; a run never goes back to one.
        """
        stage, start = self.progress.stage, self.progress.stage_start
        while stage + 1 < len(self.stages):
            end = round(sum(stage.share for stage in self.stages[: stage + 1]) * total)
            if step < end:
                break
            stage, start = stage + 1, max(end, self.progress.step)
        return stage, start


class Trainer(TrainingLoop[MuonAdamW]):
    """The loop of one process and its replicas, with the state in one file."""

    def _kept(self, count: int) -> Kept:
        return KeptStates(self.run_dir / KEPT, count)

    def _go_back(self, path: Path) -> None:
        self.progress = load_state(path, self.model, self.optimizer)

    def _resume(self) -> None:
        clear_folder(self.run_dir)
        take_checkpoint(self.run_dir, self.model, self.optimizer)
        if self.state_path.exists():
            self._go_back(self.state_path)
            self._check_stage(self.state_path)

    def _processes(self) -> Processes:
        sources, settings = [stage.source for stage in self.stages], self.settings
        return Replicas(
            self.model, self.optimizer, sources, settings.replicas, settings.threads, settings.micro_batches
        )

    def save(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not isinstance(parameter, StoredWeight) and not bool(parameter.isfinite().all()):
                raise NonFiniteLossError(
                    f"after step {self.progress.step - 1} parameter {name} is not finite; nothing was saved, "
                    f"{self._last_state()}"
                )
        if self.stability:
            self.progress.stability = self.stability.state()
        save_state(self.state_path, self.model, self.optimizer, self.progress)
        if self.stability:
            self.stability.keep(self.state_path, self.progress.step)

    @property
    def state_path(self) -> Path:
        return self.run_dir / STATE
