"""million: one prompt of 1,048,576 tokens through nano, looked at whenever its length has doubled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks.comparison import floors
from benchmarks.comparison.process import WorkerProcess
from benchmarks.comparison.progress import Advance
from benchmarks.comparison.rows import Row
from benchmarks.engines.contenders import SEED, WorkerContender
from benchmarks.engines.outcome import Ceilings, Outcome, in_order
from benchmarks.engines.plan import Plan
from dsv4.analysis.kv import cache_bytes
from dsv4.config import ModelConfig, nano_path


class Clock:
    """Time left of a prompt whose tokens cost a + b * position, from the pieces so far (least squares)."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float, float]] = []  # position, tokens, seconds

    def add(self, position: int, tokens: int, seconds: float) -> None:
        self._points.append((position + tokens / 2, tokens, seconds))

    def left(self, position: int, end: int) -> float:
        total = sum(tokens for _, tokens, _ in self._points)
        seconds = sum(seconds for *_, seconds in self._points)
        mean = sum(x * tokens for x, tokens, _ in self._points) / total
        spread = sum(tokens * (x - mean) ** 2 for x, tokens, _ in self._points)
        bend = sum((x - mean) * seconds for x, _, seconds in self._points) / spread if spread else 0.0
        return (end - position) * max(seconds / total + max(bend, 0.0) * ((position + end) / 2 - mean), 0.0)


@contextmanager
def bar(console: Console, total: int) -> Iterator[Advance]:
    """Tokens read, and in words what is being done and the time left."""
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=total)

        def advance(what: str) -> None:
            read, _, words = what.partition(" ")
            progress.update(task, completed=int(read), description=words)

        yield advance


def measure(plan: Plan, threads: int, advance: Advance) -> Outcome:
    """Prefill in pieces; at every mark the time so far, the peak so far, and some tokens decoded and taken back."""
    folder = nano_path()
    config = ModelConfig.from_pretrained(folder)
    rows: list[Row] = []
    with WorkerProcess("ceilings", threads) as machine, WorkerProcess("dsv4", threads) as worker:
        ceilings = Ceilings(machine, plan.ceilings)
        ceilings.measure()
        contender = WorkerContender(worker, plan)
        contender.load(folder)
        worker.ask("begin", max_tokens=plan.million + plan.million_steps)
        cache = worker.ask("cache")
        clock, spent, peak, start = Clock(), 0.0, 0, time.perf_counter()
        for done, mark in pairwise((0, *plan.marks())):
            for position in range(done, mark, plan.million_chunk):
                tokens = min(plan.million_chunk, mark - position)
                answer = worker.ask("feed", length=tokens, seed=SEED + position)
                clock.add(position, tokens, answer["seconds"])
                spent, peak = spent + answer["seconds"], answer["peak_bytes"]
                read = position + tokens
                left = timedelta(seconds=round(clock.left(read, plan.million)))
                advance(f"{read} {read:,} tokens, {tokens / answer['seconds']:,.0f} a second, {left} left")
            steps = worker.ask("decode_on", steps=plan.million_steps, seed=SEED)
            decode = plan.million_steps / steps["seconds"]
            rows += mark_rows(config, mark, mark / spent, decode, peak, cache["element_bytes"], ceilings.best())
        ceilings.measure()
    rows[-1].extra.update(cache_num_bytes=cache["num_bytes"], wall_s=time.perf_counter() - start, prefill_s=spent)
    return Outcome("million", config, in_order(rows), ceilings.best(), {"dsv4": contender.settings})


def mark_rows(
    config: ModelConfig, tokens: int, prefill: float, decode: float, peak: int, element: int, ceilings: dict[str, float]
) -> list[Row]:
    """The three figures of one length."""
    least = tokens * floors.matrix_rate(ceilings) / floors.prefill_flops(config, tokens)
    weights = ceilings["read_bytes_per_s"] / floors.token_bytes(config)
    kv = kv_bytes(config, tokens, element)
    return [
        Row("dsv4", "decode", tokens, "tok/s", [decode], weights),
        Row("dsv4", "prefill", tokens, "tok/s", [prefill], least),
        Row("dsv4", "peak memory", tokens, "bytes", [float(peak)], float(kv), "floor: the KV formula, no weights"),
    ]


def kv_bytes(config: ModelConfig, tokens: int, element: int) -> int:
    """The KV formula's figure for entries of `element` bytes a channel (4 fp32, 2 BF16, 1 FP8 with FP4 index keys)."""
    found = cache_bytes(config, tokens, "fp8+fp4" if element == 1 else "bf16")
    wide = (found.growing + found.windows) * element // 2 if element > 1 else found.growing + found.windows
    return wide + found.states
