"""GRPO runs of the small model over a rollout service with workers in processes of their own."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsv4.checkpoint import load_model
from dsv4.config import nano_path
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rewards import RewardSettings
from dsv4.post_training.rollout_service.launchers import Launcher, ProcessLauncher
from dsv4.post_training.rollout_service.process import WorkerPlan, work
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.records import Step
from dsv4.post_training.rollout_service.service import RolloutService, ServiceSettings
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.export import export_model
from dsv4.training.optim import MuonAdamW
from dsv4.training.schedule import Schedule

from ..forked import FORKED
from .small_policy import TextProblems, has_f, small_policy

LOOP = LoopSettings(steps=3, schedule=Schedule(0.05, 0, 0.0), prompts=2, max_tokens=6, save_every=1)
SETTINGS = GRPORunSettings(
    LearnerSettings(GRPOSettings(kl=0.0)), RewardSettings(judge_cut_off=True), group_size=4, mini_batches=2
)


def small_folder(root: Path) -> Path:
    """A folder with the small model."""
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


Stays = Callable[[int, int], bool]  # of the number of a worker, from 0, and of the tokens that it has logged


def _never(number: int, tokens: int) -> bool:
    return False


def _work(plan: WorkerPlan, number: int, stays: Stays) -> None:
    """Work on the queue. While `stays(...)`, the worker does no more than keep its leases."""
    torch.set_num_threads(1)
    write, logged = RolloutQueue.write, 0

    def counted(queue: RolloutQueue, steps: Sequence[Step]) -> set[int]:
        nonlocal logged
        lost = write(queue, steps)
        logged += sum(len(step.tokens) for step in steps if step.lease.id not in lost)
        while stays(number, logged):
            time.sleep(0.05)
            write(queue, [Step(step.lease, step.position) for step in steps])
        return lost

    RolloutQueue.write = counted  # type: ignore[method-assign]
    work(plan)


class ForkedWorker:
    """A worker in a process that is forked where all imports are done; `killed` gets its process if SIGKILL ends it."""

    def __init__(self, plan: WorkerPlan, killed: set[int], number: int, stays: Stays) -> None:
        self._process = FORKED.Process(target=_work, args=(plan, number, stays), daemon=True)
        self._killed = killed
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def ended(self) -> str | None:
        status = self._process.exitcode
        if status == -signal.SIGKILL:
            self._killed.add(self.pid)
        return None if status is None else f"ended with status {status}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class ForkedLauncher:
    """Starts workers that are there in no time, each of which goes on unless `stays`.

    `started`: their processes, in order; `killed`: those that SIGKILL has ended.
    """

    def __init__(self, stays: Stays = _never) -> None:
        self.started, self.killed = list[int](), set[int]()
        self._stays = stays

    def start(self, plan: WorkerPlan, place: int) -> ForkedWorker:
        worker = ForkedWorker(plan, self.killed, len(self.started), self._stays)
        self.started.append(worker.pid)
        return worker

    def close(self) -> None:
        """Nothing: the server that forks them is for other tests too."""


def make_service(
    run_dir: Path,
    folder: Path,
    launcher: Launcher | None = None,
    url: str | None = None,
    lease_seconds: float = 60.0,
    max_model_len: int = 256,
    **settings: Any,
) -> RolloutService:
    place = run_dir / "service"
    place.mkdir(parents=True, exist_ok=True)
    plan = WorkerPlan(
        run=run_dir.name, url=url or f"sqlite:///{place / 'queue.db'}", weights=str(place / "weights"),
        model=str(folder), numerics="float", quantized=True, device="cpu", max_num_seqs=16,
        max_model_len=max_model_len, lease_seconds=lease_seconds, max_stalled=5,
        workers=settings.setdefault("workers", 2), silence_seconds=600.0,
    )  # fmt: skip
    return RolloutService(plan, ServiceSettings(**settings), launcher or ProcessLauncher(place, 1), Console())


def make_run(
    run_dir: Path,
    folder: Path,
    service: RolloutService | None = None,
    settings: GRPORunSettings = SETTINGS,
    problems: Any = None,
    max_model_len: int = 256,
    **loop: Any,
) -> GRPORun:
    model = load_model(folder, weights="widened").requires_grad_()
    policy = ServedPolicy(model, folder, max_num_seqs=16, max_model_len=max_model_len)
    optimizer = MuonAdamW(model, model.config)
    return GRPORun(
        policy, optimizer, problems or TextProblems(has_f), replace(LOOP, **loop), settings, run_dir, quiet=True,
        service=service,
    )  # fmt: skip


def weights(run: GRPORun) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}


def same(left: GRPORun, right: GRPORun) -> bool:
    others = weights(right)
    return all(torch.equal(p, others[name]) for name, p in weights(left).items())


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
