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
from benchmarks.harness.machine import Ceilings, best, measure_ceilings
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
class _Measured:
    """One shape: samples of tokens per second, peak bytes, and a step with the seconds of its parts, by contender."""

    what: str
    shape: Shape
    micro_batches: int
    rates: dict[str, list[float]]
    peaks: dict[str, float]
    parts: dict[str, trainers.Took]


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
        shapes = [(GRADIENT, shape, 1) for shape in self.shapes]
        if self.step is not None:
            shapes.append((STEP, *self.step))
        with Process("dsv4", 1) as process:
            matrices, pairs = process.call(trainers.matrices, folder), process.call(trainers.bf16_gradients)
        with ExitStack() as stack:
            process = stack.enter_context(Process("dsv4", 1 if self.busy else self.threads))
            alone = process if self.busy else stack.enter_context(Process("dsv4", 1))
            show("the machine")
            # Before, between and after the measurements: a rate that was measured on a busy machine is no ceiling.
            rates, measured = [self._rates(process, alone)], list[_Measured]()
            for what, shape, micro_batches in shapes:
                show(f"{what}, {micro_batches} x {label(shape)}")
                measured.append(self._shape(folder, what, shape, micro_batches))
                rates.append(self._rates(process, alone))
        ceilings = best(*rates)
        found = [row for one in measured for row in self._rows(one, ceilings, pairs, matrices, folder)]
        names = {str(a * b): label((a, b)) for a, b in self.shapes}
        settings: dict[str, Any] = {"busy": self.busy, "shapes": names, "recompute": self.recompute}
        if self.step is not None:
            settings["step"] = f"{self.step[1]} micro-batches of {label(self.step[0])}"
        return Run("train slice", found, ceilings, settings, threads=self.threads)

    def _rates(self, process: Process, alone: Process) -> Ceilings:
        """The machine's rates now; those of products per second of a processor too, of one thread in `alone`."""
        found: Ceilings = process.call(measure_ceilings, *self.ceilings, self.busy)
        one = found if self.busy else alone.call(measure_ceilings, *self.ceilings, True)
        return found | {f"{name}_flop_per_processor_s": one[f"{name}_flop_per_s"] for name in ("fp32", "bf16")}

    def _shape(self, folder: Path, what: str, shape: Shape, micro_batches: int) -> _Measured:
        """Rates and peaks of one shape, and the parts of our contenders."""
        tokens, updates = shape[0] * shape[1] * micro_batches, what == STEP
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
            for name in self.contenders:
                if name in ("dsv4", "dsv4 bf16"):
                    take(name, self.rounds, parts=True)
        parts = {name: found[-1] for name, found in taken.items() if found[-1].parts}
        return _Measured(what, shape, micro_batches, rates, peaks, parts)

    def _rows(
        self, one: _Measured, ceilings: Ceilings, bf16_gradients: bool, matrices: Sequence[Shape], folder: Path
    ) -> list[Row]:
        """Rows of one shape, with their floors."""
        documents, length = one.shape
        tokens, updates = documents * length * one.micro_batches, one.what == STEP
        work = operations(self.config, [length] * documents * one.micro_batches, bf16_gradients)
        if updates:
            work[MUON] = muon_operations(matrices), 1.0
        rows: list[Row] = []
        for name, rates in one.rates.items():
            bf16 = trainers.PRECISIONS.get(name) in ("bf16", "fp8")
            rows.append(Row(name, one.what, tokens, rates, tokens / sum(floors(work, ceilings, bf16).values())))
            least = float(self._least_bytes(folder, updates))
            rows.append(Row(name, f"{PEAK}, {one.what}", tokens, [one.peaks[name]], least))
            if name in one.parts:
                rows += _part_rows(name, one.what, tokens, one.parts[name], floors(work, ceilings, bf16, "processor_"))
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
