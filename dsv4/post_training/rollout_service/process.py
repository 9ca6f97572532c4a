"""Process of a rollout worker: an engine that follows the published weights. Its plan comes by standard input.

It ends when standard input does, so that no worker outlives its learner.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.weights import PublishedWeights
from dsv4.post_training.rollout_service.worker import IDLE_SECONDS, RolloutWorker
from dsv4.post_training.served_policy import ServedPolicy


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """Settings of a worker; JSON on the way to it."""

    name: str = ""  # each worker's own
    run: str  # whose requests it works on
    url: str
    weights: str  # folder of the published weights
    model: str  # model folder: configuration and tokenizer
    numerics: str
    quantized: bool
    device: str
    max_num_seqs: int
    max_model_len: int
    lease_seconds: float
    max_stalled: int
    workers: int  # that share the queue
    silence_seconds: float  # that it may take to go over to new weights
    learner: int | None = None  # whose worker it is, of RolloutQueue.new_learner
    enable_return_routed_experts: bool = False  # options of its engine, for the log
    enable_return_indexer_topk: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def work(plan: WorkerPlan, until: Callable[[], bool] = lambda: False) -> None:
    """Work on the queue until `until()`, each token with the latest published weights."""
    queue = RolloutQueue(plan.url, plan.lease_seconds, plan.max_stalled, run=plan.run, learner=plan.learner)
    weights, worker = PublishedWeights(Path(plan.weights)), None
    policy = _policy(plan)
    while not until():
        with ExitStack() as served:
            with nullcontext() if worker is None else worker.keeping_leases(plan.silence_seconds):
                version = weights.latest()
                if version is None or not weights.load(version, policy.model):
                    time.sleep(IDLE_SECONDS)
                    continue
                llm = served.enter_context(policy.serving())
                if worker is None:
                    worker = RolloutWorker(plan.name, queue, llm, version, plan.workers)
                worker.use(llm, version)
            worker.run(lambda seen=version: until() or weights.latest() != seen, IDLE_SECONDS / 4)
    queue.close()


def _policy(plan: WorkerPlan) -> ServedPolicy:
    folder = Path(plan.model)
    with torch.device(plan.device):
        model = Transformer(ModelConfig.from_pretrained(folder), plan.numerics)
    return ServedPolicy(
        model.requires_grad_(), folder, plan.quantized, max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len, device=plan.device,
        enable_return_routed_experts=plan.enable_return_routed_experts,
        enable_return_indexer_topk=plan.enable_return_indexer_topk,
    )  # fmt: skip


def main() -> None:
    """Work as the plan on the first line of standard input says, until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to all processes of a run: the learner says when to end
        signal.signal(number, signal.SIG_IGN)
    plan = WorkerPlan(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_input, name="dsv4-end", daemon=True).start()
    work(plan)


def _end_with_input() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
