"""Steps of `benchmarks/ranks.py` on one of two processes."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness.trainers import Documents
from dsv4.analysis.degrees import Degrees
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.parallel.expert import split_experts
from dsv4.parallel.fsdp import shard_model
from dsv4.parallel.mesh import make_mesh
from dsv4.training.gradient import Work
from dsv4.training.losses import LossWeights
from dsv4.training.optim import MuonAdamW
from dsv4.training.parts import Parts
from dsv4.training.processes import Processes
from dsv4.training.ranks import Ranks
from dsv4.training.replicas import Replicas
from dsv4.training.sharded_optim import ShardedMuonAdamW

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class RandomRows:
    """Batches of one document of random tokens."""

    tokens: int
    vocab: int

    def batch(self, step: int, /) -> Documents:
        generator = torch.Generator().manual_seed(step)
        document = torch.randint(0, self.vocab, (self.tokens,), generator=generator).tolist()
        return Documents([document])


def make_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def make_ranks(config: ModelConfig, source: RandomRows, degrees: Degrees, keep_gathered: bool = False) -> Processes:
    model, mesh = make_model(config), make_mesh(degrees)
    split_experts(model, mesh["expert"])
    shard_model(model, mesh, keep_gathered)
    optimizer = ShardedMuonAdamW(model, mesh, compute_dtype=torch.float32)
    return Ranks(model, optimizer, [source], Parts(mesh, None), degrees)


def busy_seconds() -> float:
    """Processor time of this process and its live children."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def run_step(processes: Processes, step: int) -> None:
    processes.gradient(Work(0, step, LossWeights(), quantized=False))
    processes.update(1e-4, 1.0)


def measure(step: Callable[[], None], everywhere: bool) -> tuple[float, float]:
    """(wall seconds, processor seconds of all processes) of a step; rank 0 alone runs one that is not everywhere."""
    dist.barrier()
    started, busy = time.perf_counter(), busy_seconds()
    if everywhere or dist.get_rank() == 0:
        step()
    own = torch.tensor(busy_seconds() - busy, dtype=torch.float64)
    dist.barrier()
    took = time.perf_counter() - started
    dist.all_reduce(own)
    return took, float(own)


def compare(config: ModelConfig, tokens: int, rounds: int) -> None:
    source = RandomRows(tokens, config.vocab_size)
    model = make_model(config)
    first = dist.get_rank() == 0
    optimizer = MuonAdamW(model, config, compute_dtype=torch.float32)
    kinds: dict[str, Processes] = {
        "data=2": make_ranks(config, source, Degrees(data=2)),
        "data=2, gathered once": make_ranks(config, source, Degrees(data=2), keep_gathered=True),
        "expert=2": make_ranks(config, source, Degrees(expert=2)),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("replicas", *kinds)}
    with Replicas(model, optimizer, [source], 2 if first else 1) as replicas:
        for number in range(rounds + 1):
            for name in found:
                step = partial(run_step, kinds.get(name, replicas), number)
                result = measure(step, name in kinds)
                if number:  # the first round warms up
                    found[name].append(result)
            if first:
                print(f"round {number}: {[results[-1:] for results in found.values()]}", flush=True)
    if not first:
        return
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size / 1e6:.1f} M parameters, {tokens} tokens per process and step, {rounds} rounds, load {os.getloadavg()}"
    )
    for name, results in found.items():
        wall, busy = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"{name:21} {2 * tokens / wall:8.1f} tok/s  {wall:7.2f} s wall  {busy:7.2f} s processor per step")
