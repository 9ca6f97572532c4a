"""A scenario measured: weights, logits that agree, then contenders in turns, round after round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.contenders import SEED, Contender, LlamaContender, WorkerContender, write_weights
from benchmarks.harness.gate import check_logits
from benchmarks.harness.llama_bench import LlamaBench
from benchmarks.harness.machine import floor, stored_bytes
from benchmarks.harness.process import BenchmarkError, WorkerProcess
from benchmarks.harness.results import Row, Run
from benchmarks.harness.scenarios import Scenario
from dsv4.analysis.kv import cache_bytes
from dsv4.config import ModelConfig

Advance = Callable[[str], None]  # says what comes next
SLACK_BYTES = 8 * 10**9  # of addresses beside the weights: libraries, threads, cache
PIECE = 1024  # tokens of a long prompt between two movements of the bar


class Rounds:
    """Samples of all contenders. Whatever else the machine does, it does to all of them."""

    def __init__(self, contenders: list[Contender], scenario: Scenario) -> None:
        self.contenders, self.scenario = contenders, scenario
        self.samples: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
        self.peaks: dict[tuple[str, int], int] = {}  # (contender, tokens) -> bytes
        self.failures: dict[tuple[str, str, int], str] = {}
        self._spent: defaultdict[tuple[str, str, int], float] = defaultdict(float)
        self._longest: defaultdict[str, int] = defaultdict(int)

    def turn(self, number: int, advance: Advance) -> None:
        """One round: each contender at each measure that it is asked for and that is still worth another sample."""
        for measure, tokens in self.scenario.measures():
            for contender in self.contenders if number % 2 == 0 else self.contenders[::-1]:
                advance(f"round {number + 1}: {contender.name}, {measure} at {tokens:,}")
                if self._goes_on(contender, measure, tokens):
                    self.take(contender, measure, measure, tokens, number)

    def take(self, contender: Contender, as_what: str, measure: str, tokens: int, turn: int) -> None:
        """One sample, kept as `as_what`. llama.cpp's failures are kept; those of a worker end the benchmark."""
        key = (contender.name, as_what, tokens)
        try:
            sample = contender.take(measure, tokens, turn)
        except BenchmarkError as error:
            if contender.stays:
                raise
            self.failures[key] = f"{contender.name}, {measure} at {tokens:,} tokens: {error}"
            return
        self._spent[key] += sample.wall_s
        self.samples[key].append(sample.rate)
        # The peak of a process that stays belongs to a length while no longer one came before.
        if sample.peak_bytes and tokens >= self._longest[contender.name]:
            self.peaks[contender.name, tokens] = sample.peak_bytes
            self._longest[contender.name] = tokens + 1 if contender.stays else 0

    def _goes_on(self, contender: Contender, measure: str, tokens: int) -> bool:
        key = (contender.name, measure, tokens)
        asked = self.scenario.asks(contender.name, measure, tokens)
        if not asked or key in self.failures or self._spent[key] >= self.scenario.budget_s:
            return False
        rivals = [(other.name, measure, tokens) for other in self.contenders if other.group == contender.group]
        first = {rival: self.samples[rival][0] for rival in rivals if self.samples[rival]}
        return key not in first or first[key] == max(first.values())

    def rows(self, ceilings: dict[str, float]) -> list[Row]:
        """Medians come later: samples with the floors of the machine. Decode, prefill, memory; short before long."""
        order = ("decode", "decode in turns", "prefill", "peak memory")
        found = {**self.samples, **{(name, "peak memory", n): [float(b)] for (name, n), b in self.peaks.items() if n}}
        config, layout = self.scenario.config, "fp32" if self.scenario.weights == "fp32" else "official"
        rows = [
            Row(name, measure, tokens, samples, floor(config, layout, measure, tokens, ceilings))
            for (name, measure, tokens), samples in found.items()
            if samples
        ]
        return sorted(rows, key=lambda row: (order.index(row.measure), row.tokens, row.peer))


def measure(scenario: Scenario, threads: int, scratch: Path, llama: LlamaBench | None, advance: Advance) -> Run:
    """Write the weights, compare the logits where two contenders compute them, then all rounds."""
    advance("weights")
    folders, ggufs = write_weights(scenario, scratch / scenario.name, threads, with_llama=llama is not None)
    settings: dict[str, Any] = {}
    deviation: float | None = None
    with ExitStack() as stack:
        machine = Machine(stack.enter_context(WorkerProcess("ceilings", threads)), scenario)
        limit = 2 * stored_bytes(scenario.config, "official") + SLACK_BYTES if scenario.weights == "codes" else None
        workers: list[WorkerContender] = []
        for peer in (peer for peer in scenario.peers if peer != "llama.cpp"):
            advance(f"load {peer}")
            process = stack.enter_context(WorkerProcess(peer.split()[0], threads, limit_bytes=limit))
            workers.append(WorkerContender(peer, process, scenario))
            settings[peer] = workers[-1].load(folders[peer.split()[0]])
        if "transformers" in settings:
            advance("do the logits agree?")
            processes = {worker.name: worker.process for worker in workers}
            deviation = check_logits(processes, scenario.config.vocab_size, *scenario.agree, scratch)
        if scenario.marks:
            rows = read_long_prompt(scenario, workers[0], machine, advance)
            return Run(scenario.name, rows, machine.best(), settings)
        contenders: list[Contender] = [*workers]
        if llama:
            for linears, gguf in ggufs.items():
                repack = not llama.needs_plain_weights(gguf)
                contenders += [LlamaContender(llama, gguf, linears, flash, repack, scenario) for flash in (False, True)]
        rounds = Rounds(contenders, scenario)
        for number in range(scenario.rounds):
            advance(f"round {number + 1}: what the machine can do")
            machine.measure()
            rounds.turn(number, advance)
        for turn in range(scenario.turns):
            advance(f"dsv4, decode at all depths, turn {turn + 1}")
            for depth in scenario.decode if turn % 2 == 0 else scenario.decode[::-1]:
                rounds.take(workers[0], "decode in turns", "decode", depth, turn)
    if llama:
        settings["llama.cpp"] = llama.build
    failures = list(rounds.failures.values())
    return Run(scenario.name, rounds.rows(machine.best()), machine.best(), settings, deviation, failures)


class Machine:
    """The best of what the machine was seen to do, in a process without dsv4's MKL settings."""

    def __init__(self, worker: WorkerProcess, scenario: Scenario) -> None:
        self._worker, self._sizes = worker, scenario.ceilings
        self._seen: defaultdict[str, list[float]] = defaultdict(list)

    def measure(self) -> None:
        for name, value in self._worker.ask("ceilings", **self._sizes).items():
            self._seen[name].append(value)

    def best(self) -> dict[str, float]:
        return {name: max(values) for name, values in self._seen.items()}


def read_long_prompt(scenario: Scenario, worker: WorkerContender, machine: Machine, advance: Advance) -> list[Row]:
    """One prompt in pieces; at every mark the rate so far, the peak so far, and steps decoded and taken back."""
    machine.measure()
    worker.process.ask("begin", max_tokens=scenario.marks[-1] + scenario.steps)
    element = worker.process.ask("cache")["element_bytes"]
    spent, read, found = 0.0, 0, dict[tuple[str, int], float]()
    for mark in scenario.marks:
        while read < mark:
            answer = worker.process.ask("feed", length=min(PIECE, mark - read), seed=SEED + read)
            read, spent = read + min(PIECE, mark - read), spent + answer["seconds"]
            advance(f"{read:,} of {scenario.marks[-1]:,} tokens")
        found["prefill", mark], found["peak memory", mark] = mark / spent, answer["peak_bytes"]
        seconds = worker.process.ask("decode_on", steps=scenario.steps, seed=SEED)["seconds"]
        found["decode", mark] = scenario.steps / seconds
    machine.measure()
    config, best = scenario.config, machine.best()
    return [
        Row("dsv4", what, tokens, [value], kv_bytes(config, tokens, element))
        if what == "peak memory"
        else Row("dsv4", what, tokens, [value], floor(config, "official", what, tokens, best))
        for (what, tokens), value in sorted(found.items())
    ]


def kv_bytes(config: ModelConfig, tokens: int, element: int) -> float:
    """The KV formula's bytes for entries of `element` bytes per channel (4 fp32, 2 BF16, 1 FP8 and FP4 index keys)."""
    found = cache_bytes(config, tokens, "fp8+fp4" if element == 1 else "bf16")
    wide = (found.growing + found.windows) * element // 2 if element > 1 else found.growing + found.windows
    return float(wide + found.states)


def num_stages(scenario: Scenario, with_llama: bool) -> int:
    """Number of times that `measure` calls `advance`."""
    loaded = [peer for peer in scenario.peers if peer != "llama.cpp"]
    before = 1 + len(loaded) + ("transformers" in loaded)
    if scenario.marks:
        return before + sum(-(-(b - a) // PIECE) for a, b in zip((0, *scenario.marks), scenario.marks, strict=False))
    contenders = len(loaded) + (4 if with_llama and "llama.cpp" in scenario.peers else 0)
    return before + scenario.rounds * (1 + contenders * len(scenario.measures())) + scenario.turns
