"""Time to first token of a long prompt: computed, from memory, and from disk after a restart, by policy."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.harness.machine import floor, measure_ceilings, stored_bytes
from benchmarks.harness.process import BenchmarkError, Process
from benchmarks.harness.recording import Show
from benchmarks.harness.results import Row, Run
from benchmarks.harness.turns import in_turns
from dsv4.config import ModelConfig

MEASURE = "first token"
COLD, MEMORY, BYTES = "cold", "memory", "bytes"
POLICIES = ("full", "periodic:4096", "zero")  # of the window on disk (LLM's cache_window)
LONG = 8192  # tokens of a prompt of which every policy keeps a part; of a shorter one some keep nothing
REPEATS = 5  # of the same prompt per round, from memory


@dataclass(frozen=True)
class Repeated:
    """One prompt of `tokens` random tokens, in each round another, asked for again and again."""

    folder: Path
    tokens: int
    rounds: int
    threads: int
    model: str
    ceilings: tuple[int, int] = (256, 2048)
    spent: dict[str, list[float]] = field(default_factory=dict[str, list[float]])  # bytes by source

    def measure(self, show: Show) -> Run:
        config = ModelConfig.from_pretrained(self.folder)
        run = Run(f"serving prefix {self.model}", [], {}, {"tokens": self.tokens}, threads=self.threads)
        with Process("ceilings", self.threads) as process:
            run.ceilings = process.call(measure_ceilings, *self.ceilings)
        with tempfile.TemporaryDirectory(prefix="dsv4-prefix-") as scratch, Process("dsv4", self.threads) as process:
            process.call(load, self.folder, self._options())
            takes = {COLD: partial(self._cold, process, show), MEMORY: partial(self._memory, process, show)}
            for policy in POLICIES:
                takes[policy] = partial(self._disk, Path(scratch), policy, show)
            samples = in_turns(takes, self.rounds)
        computed = floor(config, "official", "prefill", self.tokens, run.ceilings)
        best = {COLD: self.tokens / computed}
        again = 1 / floor(config, "official", "decode", self.tokens, run.ceilings)
        rows = [Row(name, MEASURE, self.tokens, found, best.get(name, again)) for name, found in samples.items()]
        sizes = [Row(name, BYTES, self.tokens, found, 0.0) for name, found in self.spent.items()]
        run.rows, run.settings["weights"] = [*rows, *sizes], stored_bytes(config, "official")
        return run

    def _options(self) -> dict[str, Any]:
        return {"max_model_len": self.tokens + 8, "max_num_seqs": 2}

    def _cold(self, process: Process, show: Show, turn: int) -> float:
        show(f"round {turn + 1}: cold")
        process.call(forget)
        return process.call(first_token, self.tokens, turn, False)

    def _memory(self, process: Process, show: Show, turn: int) -> float:
        """The best of some repetitions: they take milliseconds, and an interruption as long."""
        show(f"round {turn + 1}: memory")
        process.call(forget)
        process.call(first_token, self.tokens, turn, False)
        self.spent.setdefault(MEMORY, []).append(process.call(memory_bytes))
        return min(process.call(first_token, self.tokens, turn, True) for _ in range(REPEATS))

    def _disk(self, scratch: Path, policy: str, show: Show, turn: int) -> float:
        """Write with one process, then read with another one."""
        show(f"round {turn + 1}: disk, {policy}")
        folder = scratch / f"{policy.replace(':', '-')}-{turn}"
        options = {**self._options(), "cache_dir": str(folder), "cache_window": policy}
        with Process("dsv4", self.threads) as process:
            process.call(load, self.folder, options)
            process.call(first_token, self.tokens, turn, False)
            process.call(close)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self.spent.setdefault(policy, []).append(float(size))
        with Process("dsv4", self.threads) as process:
            process.call(load, self.folder, options)
            known = True if policy == "full" or self.tokens >= LONG else None
            return process.call(first_token, self.tokens, turn, known)


# Below: functions of dsv4's process, which keeps its LLM.

_llm: list[Any] = []


def load(folder: Path, options: dict[str, Any]) -> None:
    """Load the model and generate from a short prompt: the first forward allocates."""
    from dsv4 import LLM, SamplingParams

    _llm[:] = [LLM(folder, **options)]
    _llm[0].generate([[3, 4, 5]], SamplingParams(max_tokens=2, ignore_eos=True))


def first_token(tokens: int, seed: int, known: bool | None) -> float:
    """Seconds to the first token of the prompt of `seed`. BenchmarkError unless the cache knows it, or does not; None:
    either."""
    from dsv4 import SamplingParams

    (llm,) = _llm
    prompt = np.random.default_rng(seed).integers(3, llm.config.vocab_size, size=tokens).tolist()
    start = perf_counter()
    stream = llm.stream(prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    event = next(stream)
    seconds = perf_counter() - start
    stream.close()
    if known is not None and bool(event.cached_tokens) != known:
        raise BenchmarkError(f"{event.cached_tokens} of {tokens} tokens came from a cache, where known is {known}")
    return seconds


def forget() -> None:
    _llm[0].reset_prefix_cache()


def memory_bytes() -> float:
    """Bytes of stored prefixes in memory."""
    return float(_llm[0].core.scheduler.cache_manager.prefixes.num_bytes)


def close() -> None:
    """Let the LLM go, so that what it has to write is written."""
    _llm.pop().close()
