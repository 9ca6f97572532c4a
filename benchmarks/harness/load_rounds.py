"""Servers under the same load in interleaved rounds: dsv4 serve, llama-server and transformers serve."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.harness.contenders import SEED, write_weights
from benchmarks.harness.load import Load, Measured, Writer, measure, writer
from benchmarks.harness.machine import Ceilings, fastest_product, measure_ceilings, prefill_flops, token_bytes
from benchmarks.harness.process import BenchmarkError, Process
from benchmarks.harness.recording import Show
from benchmarks.harness.results import Row, Run
from benchmarks.harness.scenarios import NANO, Scenario
from benchmarks.harness.servers import Server, dsv4_server, llama_server, transformers_server
from benchmarks.harness.turns import in_turns
from dsv4.analysis.flops import decode_flops
from dsv4.config import ModelConfig, nano_path

REQUESTS = {1: 4, 8: 16, 32: 32, 128: 128}  # by concurrency; else as many as at a time
SHORTEST, LONGEST, ANSWER = 100, 8000, 64  # tokens
Figure = tuple[str, int]  # contender, concurrency
Make = Callable[[Load], Server]  # a contender with its best settings for a load


def loads(levels: tuple[int, ...], quick: bool) -> list[Load]:
    if quick:
        return [Load(level, level, 8, 60, 4) for level in levels]
    return [Load(level, REQUESTS.get(level, level), SHORTEST, LONGEST, ANSWER) for level in levels]


def with_vocabulary(scenario: Scenario) -> Scenario:
    """The scenario with a vocabulary of nano's size: a server needs a tokenizer, and nano's is there."""
    return replace(scenario, config=replace(scenario.config, vocab_size=NANO.vocab_size))


@dataclass
class LoadRounds:
    """One model under every load. longest_s: duration that a load may be expected to take, for others than dsv4."""

    scenario: Scenario
    loads: list[Load]
    rounds: int
    threads: int
    scratch: Path
    llama: Path | None
    with_transformers: bool
    longest_s: float
    measured: dict[Figure, list[Measured]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[Figure, str] = field(default_factory=dict[Figure, str])

    def measure(self, show: Show) -> Run:
        show("weights")
        place, llama = self.scratch / f"serving-{self.scenario.name}", self.llama
        folders, ggufs = write_weights(self.scenario, place, self.threads, llama is not None, with_tokenizer=True)
        self._writer: Writer = writer(nano_path())
        run = Run(f"serving load {self.scenario.name}", [], {}, {"answer": self.loads[0].answer}, threads=self.threads)
        with Process("ceilings", self.threads) as process:
            run.ceilings = process.call(measure_ceilings, *self.scenario.ceilings)
        makes: dict[str, Make] = {"dsv4": partial(_dsv4, folders["dsv4"], self.threads)}
        if self.with_transformers:
            makes["transformers"] = lambda _: transformers_server(folders["transformers"])
        if llama is not None:
            makes["llama.cpp"] = self._best_llama(llama, ggufs, show)
        takes = {
            (name, load.concurrency): partial(self._take, name, make, load, show)
            for load in self.loads
            for name, make in makes.items()
        }
        in_turns(takes, self.rounds)
        for load in self.loads:
            run.rows += self._rows(load, run.ceilings)
        run.failures = list(self.failures.values())
        run.settings["alike"] = {name: self._alike(name) for name in makes}
        return run

    def _best_llama(self, program: Path, ggufs: list[Path], show: Show) -> Make:
        """llama-server with the file and the attention that serve the smallest load of several requests best."""
        load = next((load for load in self.loads if load.concurrency > 1), self.loads[0])
        trial = replace(load, requests=load.concurrency)
        tried: dict[float, Make] = {}
        for gguf in ggufs:
            for flash in (False, True):
                make = partial(_llama, program, gguf, self.threads, flash)
                show(f"which setting of llama-server is fastest? {make(trial).name}")
                try:
                    found = measure(make(trial), self.threads, trial, self._prompts(trial, 0))
                except BenchmarkError as error:
                    self.failures[make(trial).name, 0] = f"{make(trial).name}: {error}"
                else:
                    tried[found.figures()["total tokens"]] = make
        if not tried:
            raise BenchmarkError("; ".join(self.failures.values()))
        return tried[max(tried)]

    def _prompts(self, load: Load, turn: int) -> list[str]:
        draw = random.Random(SEED + turn)
        return [self._writer.write(tokens, draw) for tokens in load.lengths(SEED + turn)]

    def _take(self, name: str, make: Make, load: Load, show: Show, turn: int) -> float | None:
        """Tokens per second; None after a failure, or where the load would take too long."""
        key, server = (name, load.concurrency), make(load)
        if key in self.failures:
            return None
        expected = self._expected_s(name, load)
        if name != "dsv4" and expected > self.longest_s:
            self.failures[key] = f"{name} at {load.concurrency}: left out, it would take about {expected:.0f} s"
            return None
        show(f"round {turn + 1}: {server.name} at {load.concurrency}")
        try:
            found = measure(server, self.threads, load, self._prompts(load, turn))
        except BenchmarkError as error:
            if name == "dsv4":
                raise
            self.failures[key] = f"{name} at {load.concurrency}: {error}"
            return None
        self.measured[key].append(found)
        ours = self.measured["dsv4", load.concurrency]
        if len(ours) > turn and [r.prompt_tokens for r in ours[turn].replies] != [
            r.prompt_tokens for r in found.replies
        ]:
            raise BenchmarkError(f"{name} reads other prompts than dsv4: their numbers of tokens differ")
        return found.figures()["total tokens"]

    def _expected_s(self, name: str, load: Load) -> float:
        rates = [
            m.figures()["total tokens"] for (peer, _), found in self.measured.items() if peer == name for m in found
        ]
        return (sum(load.lengths(0)) + load.requests * load.answer) / max(rates) if rates else 0.0

    def _rows(self, load: Load, ceilings: Ceilings) -> list[Row]:
        lengths = load.lengths(SEED)
        seconds = floor_s(self.scenario.config, lengths, load.answer, load.concurrency, ceilings)
        output = load.answer * load.requests
        floors = {"total tokens": (sum(lengths) + output) / seconds, "output tokens": output / seconds}
        rows: list[Row] = []
        for name in ("dsv4", "llama.cpp", "transformers"):
            figures = [measured.figures() for measured in self.measured.get((name, load.concurrency), [])]
            for what in figures[0] if figures else ():
                rows.append(Row(name, what, load.concurrency, [f[what] for f in figures], floors.get(what, 0.0)))
        return rows

    def _alike(self, name: str) -> float:
        """Share of a contender's answers that begin as dsv4's do: the same model, but rounded in other ways."""
        pairs = [
            (ours.text[:2], theirs.text[:2])
            for (peer, level), found in self.measured.items()
            if peer == name
            for left, right in zip(self.measured["dsv4", level], found, strict=False)
            for ours, theirs in zip(left.replies, right.replies, strict=True)
        ]
        return sum(left == right for left, right in pairs) / max(1, len(pairs))


def floor_s(config: ModelConfig, lengths: list[int], answer: int, concurrency: int, ceilings: Ceilings) -> float:
    """Least seconds: all operations at the faster rate, or the weights read once for each step of the answers."""
    operations = sum(prefill_flops(config, n) + answer * decode_flops(config, n).raw for n in lengths)
    steps = answer * -(-len(lengths) // concurrency)
    reading = steps * token_bytes(config, "official") / ceilings["read_bytes_per_s"]
    return max(operations / fastest_product(ceilings), reading)


def _dsv4(folder: Path, threads: int, load: Load) -> Server:
    return dsv4_server(folder, threads, "--no-prefix-caching", "--max-num-seqs", str(load.concurrency))


def _llama(program: Path, gguf: Path, threads: int, flash: bool, load: Load) -> Server:
    return llama_server(program, gguf, threads, load.concurrency, load.held, flash)
