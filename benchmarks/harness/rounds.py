"""Measurement of a scenario: write weights, compare logits, then run the contenders in interleaved rounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import llama_cpp
from benchmarks.harness.contenders import SEED, Contender, PeerContender, write_weights
from benchmarks.harness.gate import deviation
from benchmarks.harness.machine import Ceilings, best, floor, kv_bytes, measure_ceilings, stored_bytes
from benchmarks.harness.process import BenchmarkError, Process
from benchmarks.harness.results import Row, Run
from benchmarks.harness.scenarios import Scenario
from benchmarks.harness.turns import in_turns

Show = Callable[[str], object]  # shows a status line
Figure = tuple[str, str, int]  # contender, measure, tokens
SLACK_BYTES = 8 * 10**9  # address space besides the weights: libraries, threads, cache
PIECE = 1024  # tokens of a long prompt per status line


class Recorder:
    """Takes the contenders' figures and records peak memory, failures and time spent."""

    def __init__(self, scenario: Scenario, show: Show) -> None:
        self._scenario, self._show = scenario, show
        self.peaks: dict[tuple[str, int], int] = {}  # (contender, tokens) -> bytes
        self.failures: dict[Figure, str] = {}
        self._spent: defaultdict[Figure, float] = defaultdict(float)
        self._longest: defaultdict[str, int] = defaultdict(int)

    def takes(self, contenders: list[Contender]) -> dict[Figure, Callable[[int], float | None]]:
        """All figures that the scenario asks for; short before long, so that a peak belongs to its length."""
        return {
            (contender.name, measure, tokens): partial(self.take, contender, measure, tokens)
            for measure, tokens in self._scenario.measures()
            for contender in contenders
            if self._scenario.asks(contender.name, measure, tokens)
        }

    def take(self, contender: Contender, measure: str, tokens: int, turn: int) -> float | None:
        """Tokens per second; None past the budget or after a failure. A failure of a `stays` contender is raised."""
        key = (contender.name, measure, tokens)
        if key in self.failures or self._spent[key] >= self._scenario.budget_s:
            return None
        self._show(f"round {turn + 1}: {contender.name}, {measure} at {tokens:,}")
        try:
            sample = contender.take(measure, tokens, turn)
        except BenchmarkError as error:
            if contender.stays:
                raise
            self.failures[key] = f"{contender.name}, {measure} at {tokens:,} tokens: {error}"
            return None
        self._spent[key] += sample.wall_s
        # The peak of a long-lived process belongs to a length only if no longer one came before.
        if sample.peak_bytes and tokens >= self._longest[contender.name]:
            self.peaks[contender.name, tokens] = sample.peak_bytes
            self._longest[contender.name] = tokens + 1 if contender.stays else 0
        return sample.rate


def measure(scenario: Scenario, threads: int, scratch: Path, llama: Path | None, show: Show) -> Run:
    """Write the weights, compare logits with transformers if it takes part, then run all rounds."""
    show("weights")
    folders, ggufs = write_weights(scenario, scratch / scenario.name, threads, with_llama=llama is not None)
    run = Run(scenario.name, [], {}, {}, threads=threads)
    with ExitStack() as stack:
        machine = Machine(stack.enter_context(Process("ceilings", threads)), scenario)
        limit = 2 * stored_bytes(scenario.config, "official") + SLACK_BYTES if scenario.weights == "codes" else None
        peers: list[PeerContender] = []
        for name in (name for name in scenario.peers if name != "llama.cpp"):
            show(f"load {name}")
            package = name.split()[0]
            process = stack.enter_context(Process(package, threads, limit))
            peers.append(PeerContender(name, process, scenario))
            run.settings[name] = peers[-1].load(folders[package])
        if "transformers" in run.settings:
            show("do the logits agree?")
            prompt, steps = scenario.agree
            ids = np.random.default_rng(7).integers(scenario.config.vocab_size, size=prompt + steps).tolist()
            run.deviation = deviation(*(peer.ask("logits", ids, prompt) for peer in peers))
        if scenario.marks:
            run.rows = read_long_prompt(scenario, peers[0], machine, show)
        else:
            programs = llama_cpp.contenders(llama, ggufs, threads, scenario.steps) if llama else []
            run.rows, run.failures = take_rounds(scenario, peers, programs, machine, show)
            if programs:
                run.settings["llama.cpp"] = programs[-1].build
        run.ceilings = machine.best
    return run


def take_rounds(
    scenario: Scenario,
    peers: list[PeerContender],
    programs: list[llama_cpp.LlamaContender],
    machine: Machine,
    show: Show,
) -> tuple[list[Row], list[str]]:
    """Rows (decode, prefill, memory; short before long) and failures."""
    recorder, turns = Recorder(scenario, show), Recorder(scenario, show)
    takes = recorder.takes([*peers, *programs])
    samples = in_turns({("machine", "", 0): machine.measure, **takes}, scenario.rounds)
    again = {(peers[0].name, "decode in turns", n): partial(turns.take, peers[0], "decode", n) for n in scenario.decode}
    samples |= in_turns(again, scenario.turns)
    samples |= {(name, "peak memory", n): [float(peak)] for (name, n), peak in recorder.peaks.items() if n}
    order, layout = ("decode", "decode in turns", "prefill", "peak memory"), scenario.layout
    rows = [
        Row(name, what, tokens, values, floor(scenario.config, layout, what, tokens, machine.best))
        for (name, what, tokens), values in samples.items()
        if values
    ]
    return sorted(rows, key=lambda row: (order.index(row.measure), row.tokens, row.peer)), [*recorder.failures.values()]


class Machine:
    """Best measured ceilings of the machine, in a process without dsv4's settings of torch."""

    def __init__(self, process: Process, scenario: Scenario) -> None:
        self._process, self._sizes = process, scenario.ceilings
        self.best: Ceilings = {}

    def measure(self, _: int = 0) -> None:
        seen = self._process.call(measure_ceilings, *self._sizes)
        self.best = best(seen, self.best) if self.best else seen


def read_long_prompt(scenario: Scenario, peer: PeerContender, machine: Machine, show: Show) -> list[Row]:
    """Read one prompt in pieces; at every mark record rate and peak so far, and decode steps that are then undone."""
    machine.measure()
    peer.ask("begin", scenario.marks[-1] + scenario.steps)
    element = peer.ask("element_bytes")
    spent, peak, read, found = 0.0, 0, 0, dict[tuple[str, int], float]()
    for mark in scenario.marks:
        while read < mark:
            seconds, peak = peer.ask("feed", min(PIECE, mark - read), SEED + read)
            read, spent = read + min(PIECE, mark - read), spent + seconds
            show(f"{read:,} of {scenario.marks[-1]:,} tokens")
        found["prefill", mark], found["peak memory", mark] = mark / spent, peak
        found["decode", mark] = scenario.steps / peer.ask("decode_on", scenario.steps, SEED)[0]
    machine.measure()
    config = scenario.config
    return [
        Row("dsv4", what, tokens, [value], kv_bytes(config, tokens, element))
        if what == "peak memory"
        else Row("dsv4", what, tokens, [value], floor(config, scenario.layout, what, tokens, machine.best))
        for (what, tokens), value in sorted(found.items())
    ]
