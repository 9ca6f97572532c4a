"""Rounds of `dsv4 bench train`: contenders in turns, in new processes per shape, so that a peak is a shape's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import trainers
from benchmarks.harness.machine import Ceilings, measure_ceilings
from benchmarks.harness.process import ROOT, BenchmarkError, Process, plain_environment
from benchmarks.harness.random_checkpoint import write_random_values
from benchmarks.harness.results import Row, Run
from benchmarks.harness.training_parts import MUON, REST, floors, muon_operations, operations
from benchmarks.harness.turns import in_turns
from dsv4.analysis.activations import Recompute
from dsv4.config import ModelConfig

GRADIENT, STEP, PEAK, PART = "forward and backward", "whole step", "peak memory", "part"
Shape = tuple[int, int]  # documents, tokens


@dataclass(frozen=True)
class TrainRounds:
    """Settings of a comparison of training.

    shapes: of forward and backward; step: shape and number of the micro-batches of a whole step, or None. busy: rates
    per processor second in place of wall time. recompute: activation checkpointing of our contenders.
    """

    config: ModelConfig
    contenders: Sequence[str]
    shapes: Sequence[Shape]
    step: tuple[Shape, int] | None
    rounds: int
    threads: int
    busy: bool
    scratch: Path
    ceilings: tuple[int, int] = (256, 2048)
    recompute: Recompute = "none"

    def measure(self, show: Callable[[str], object]) -> Run:
        folder = self.scratch / "train"
        write_random_values(self.config, folder, 1, "fp32")
        found: list[Row] = []
        with Process("dsv4", 1 if self.busy else self.threads) as process:
            show("the machine")
            ceilings: Ceilings = process.call(measure_ceilings, *self.ceilings, self.busy)
            matrices = process.call(trainers.matrices, folder)
        for shape in self.shapes:
            show(f"{GRADIENT}, {label(shape)}")
            found += self._shape(folder, shape, 1, False, ceilings, matrices)
        if self.step is not None:
            show(f"{STEP}, {self.step[1]} x {label(self.step[0])}")
            found += self._shape(folder, *self.step, True, ceilings, matrices)
        names = {str(a * b): label((a, b)) for a, b in self.shapes}
        settings: dict[str, Any] = {"busy": self.busy, "shapes": names, "recompute": self.recompute}
        if self.step is not None:
            settings["step"] = f"{self.step[1]} micro-batches of {label(self.step[0])}"
        return Run("train slice", found, ceilings, settings, threads=self.threads)

    def _shape(
        self,
        folder: Path,
        shape: Shape,
        micro_batches: int,
        updates: bool,
        ceilings: Ceilings,
        matrices: Sequence[Shape],
    ) -> list[Row]:
        """Rows of one shape: rates, peaks, and the parts of the fastest of our contenders."""
        tokens, what = shape[0] * shape[1] * micro_batches, STEP if updates else GRADIENT
        work = operations(self.config, [shape[1]] * shape[0] * micro_batches)
        if updates:
            work[MUON] = muon_operations(matrices), 1.0
        taken: dict[str, list[trainers.Took]] = {name: [] for name in self.contenders}
        with ExitStack() as stack:
            processes = {name: stack.enter_context(Process(name.split()[0], self.threads)) for name in taken}

            def take(name: str, number: int, parts: bool = False) -> float:
                took = processes[name].call(trainers.run, name, shape, micro_batches, updates, number, parts)
                taken[name].append(took)
                return tokens / (took.busy if self.busy else took.wall)

            for name, process in processes.items():
                process.call(trainers.load, name, folder, self.recompute)
                take(name, -1)  # the first one also reserves memory
            rates = in_turns({name: partial(take, name) for name in taken}, self.rounds)
            peaks = {name: float(found[-1].peak) for name, found in taken.items()}
            profiled = [name for name in self.contenders if name in ("dsv4", "dsv4 bf16")]
            for name in profiled:
                take(name, self.rounds, parts=True)
        rows: list[Row] = []
        for name in taken:
            least = floors(work, ceilings, trainers.PRECISIONS.get(name) in ("bf16", "fp8"))
            rows += [Row(name, what, tokens, rates[name], tokens / sum(least.values()))]
            rows += [Row(name, f"{PEAK}, {what}", tokens, [peaks[name]], float(self._least_bytes(folder, updates)))]
            if name in profiled:
                cores = 1 if self.busy else self.threads  # of which the ceilings are the rates
                rows += _part_rows(name, what, tokens, taken[name][-1], {k: cores * v for k, v in least.items()})
        return rows

    def _least_bytes(self, folder: Path, updates: bool) -> int:
        """Bytes of the weights, their gradients and, with an update, a momentum."""
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return weights * (3 if updates else 2)


def label(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]:,}"


def _part_rows(name: str, what: str, tokens: int, took: trainers.Took, least: dict[str, float]) -> list[Row]:
    """Processor seconds of each part of one step of `tokens`, and their floors."""
    parts = {part: took.parts.get(part, 0.0) for part in least}
    parts[REST] = took.busy - sum(parts.values())
    rows = [
        Row(name, f"{PART}, {what}: {part}", tokens, [seconds], least.get(part, 0.0)) for part, seconds in parts.items()
    ]
    return [row for row in rows if row.median > 0]


@dataclass(frozen=True)
class NanoRounds:
    """nano's recipe as `dsv4 train nano` runs it, in this checkout and, if given, in an older one."""

    before: Path | None
    steps: int
    rounds: int
    arguments: Sequence[str]  # of the recipe, for this checkout

    def measure(self, show: Callable[[str], object]) -> Run:
        places = {"dsv4": ROOT} | ({"before": self.before} if self.before is not None else {})

        def take(name: str, number: int) -> float:
            show(f"{name}, round {number + 1}")
            return train_nano(places[name], self.steps, self.arguments if name == "dsv4" else ())

        rates = in_turns({name: partial(take, name) for name in places}, self.rounds)
        rows = [Row(name, "nano", 0, found, 0.0) for name, found in rates.items()]
        return Run("train nano", rows, {}, {"steps": self.steps, "arguments": list(self.arguments)})


def train_nano(checkout: Path, steps: int, arguments: Sequence[str]) -> float:
    """Median tokens per second of the recipe's steps in a checkout, but for the first one."""
    with TemporaryDirectory() as folder:
        run, out = Path(folder) / "run", Path(folder) / "model"
        command = [python_of(checkout), "-m", "dsv4", "train", "nano", "--steps", str(steps), "--run-dir", str(run)]
        done = subprocess.run(
            [*command, "--out", str(out), *arguments], cwd=checkout, env=plain_environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        metrics = next(run.rglob("metrics.jsonl"), None)  # of the base; older recipes have one part
        if done.returncode or metrics is None:
            raise BenchmarkError(f"{' '.join(command)} in {checkout.name} failed: {done.stderr.strip()[-500:]}")
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return median(line["tokens_per_second"] for line in lines[1:] or lines)


def python_of(checkout: Path) -> str:
    """Interpreter of a checkout's own environment: this one's imports the package of this checkout wherever it runs."""
    if checkout == ROOT:
        return sys.executable
    python = checkout.absolute() / ".venv" / "bin" / "python"
    if not python.exists():
        raise BenchmarkError(f"{python} is missing; to make it: make -C {checkout} .venv/.test")
    return str(python)
