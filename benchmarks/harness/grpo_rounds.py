"""Rounds of `dsv4 bench grpo`: one step of each contender in turns, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.harness import policy_trainers, trainers
from benchmarks.harness.contenders import TOKENIZER_FILES
from benchmarks.harness.machine import Ceilings, fastest_product, measure_ceilings, prefill_flops
from benchmarks.harness.policy_trainers import ADAMW, MUON, TRL, Shape, Took
from benchmarks.harness.process import BenchmarkError, Process
from benchmarks.harness.results import Row, Run
from benchmarks.harness.sums import EVEN
from benchmarks.harness.training_parts import muon_operations
from benchmarks.harness.turns import in_turns
from dsv4.analysis.flops import decode_flops
from dsv4.analysis.training_flops import training_flops
from dsv4.checkpoint import convert
from dsv4.config import ModelConfig, nano_path

ROLLOUTS, UPDATES, TOGETHER, PEAK = "rollouts", "updates", "together", "peak memory"
CONTENDERS = (MUON, ADAMW, TRL)


@dataclass(frozen=True)
class GrpoRounds:
    """Settings of a comparison of GRPO on nano. busy: rates per processor second. packages: folder of TRL's."""

    contenders: Sequence[str]
    shape: Shape
    rounds: int
    threads: int
    busy: bool
    scratch: Path
    packages: Path | None = None
    ceilings: tuple[int, int] = (256, 2048)

    def measure(self, show: Callable[[str], object]) -> Run:
        theirs = self.scratch / "transformers"
        with Process("dsv4", 1 if self.busy else self.threads) as process:
            show("the machine")
            ceilings: Ceilings = process.call(measure_ceilings, *self.ceilings, self.busy)
            matrices = process.call(trainers.matrices, nano_path())
            if TRL in self.contenders:
                process.call(convert, nano_path(), theirs, "transformers", overwrite=True)
                assert all((theirs / name).exists() for name in TOKENIZER_FILES)
        taken: dict[str, list[Took]] = {name: [] for name in self.contenders}
        with ExitStack() as stack:
            processes = {name: stack.enter_context(Process(name.split()[0], self.threads)) for name in taken}

            def take(name: str, number: int) -> float:
                show(f"{name}, step {number + 1} of {self.rounds}")
                took: Took = processes[name].call(policy_trainers.run, name, number + 1, False)
                if took.tokens != self.shape.sampled:
                    raise BenchmarkError(f"{name} sampled {took.tokens} tokens in a step, not {self.shape.sampled}")
                taken[name].append(took)
                return took.rollouts + took.updates

            differences: dict[str, float | None] = {}
            for name, process in processes.items():
                show(f"{name}, first step")
                folder, place = theirs if name == TRL else nano_path(), self.scratch / name.replace(" ", "-")
                process.call(policy_trainers.load, name, folder, place, self.shape, self.busy, self.packages)
                differences[name] = process.call(policy_trainers.run, name, 0, True).difference
            in_turns({name: partial(take, name) for name in taken}, self.rounds)
            if TRL in processes:
                show(f"{TRL}, prompts of one length")
                number = EVEN // self.shape.prompts + 1
                even: Took = processes[TRL].call(policy_trainers.run, TRL, number, True)
                differences[f"{TRL}, even"] = even.difference
            prompt = processes[self.contenders[0]].call(prompt_tokens, self.shape, self.rounds)
        config = ModelConfig.from_pretrained(nano_path())
        rows: list[Row] = []
        for name, took in taken.items():
            least = floors(config, self.shape, prompt, matrices if name == MUON else (), ceilings)
            rows += _rows(name, took, self.shape, least)
        settings = {
            "busy": self.busy, "shape": asdict(self.shape), "prompt": prompt, "differences": differences,
        }  # fmt: skip
        return Run("grpo", rows, ceilings, settings, threads=self.threads)


def prompt_tokens(shape: Shape, rounds: int) -> int:
    """Mean length of the prompts of the counted steps."""
    prompts = policy_trainers.Prompts(nano_path())
    lengths = [len(prompts.ids(number)) for number in range(shape.prompts, (rounds + 1) * shape.prompts)]
    return round(sum(lengths) / len(lengths))


def floors(
    config: ModelConfig, shape: Shape, prompt: int, matrices: Sequence[tuple[int, int]], ceilings: Ceilings
) -> dict[str, float]:
    """Seconds of a step's parts at the machine's rates of products.

    A prompt is read once per group, and each answer has a forward and a backward; all in fp32, but for Muon on
    `matrices`, which has the faster rate.
    """
    exact, fast = ceilings["fp32_flop_per_s"], fastest_product(ceilings)
    token = decode_flops(config, prompt + shape.tokens // 2).raw
    sampling = shape.prompts * prefill_flops(config, prompt) + shape.answers * (shape.tokens - 1) * token
    learning = shape.answers * training_flops(config, (prompt + shape.tokens,), mtp=False)
    updates = learning / exact + shape.updates * muon_operations(matrices) / fast
    return {ROLLOUTS: sampling / exact, UPDATES: updates, TOGETHER: sampling / exact + updates}


def _rows(name: str, taken: Sequence[Took], shape: Shape, least: dict[str, float]) -> list[Row]:
    seconds = {
        ROLLOUTS: [took.rollouts for took in taken],
        UPDATES: [took.updates for took in taken],
        TOGETHER: [took.rollouts + took.updates for took in taken],
    }
    rows = [
        Row(name, what, shape.sampled, [shape.sampled / one for one in found], shape.sampled / least[what])
        for what, found in seconds.items()
    ]
    return [*rows, Row(name, PEAK, shape.sampled, [float(taken[-1].peak)], 0.0)]
