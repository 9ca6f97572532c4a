"""slice and nano: dsv4, llama.cpp and transformers take turns at the same weights."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.comparison import floors
from benchmarks.comparison.gate import check_logits
from benchmarks.comparison.process import BenchmarkError, WorkerProcess
from benchmarks.comparison.progress import Advance
from benchmarks.comparison.rows import Row
from benchmarks.engines.contenders import Contender, LlamaContender, WorkerContender, prepare
from benchmarks.engines.llama_bench import LlamaBench
from benchmarks.engines.outcome import Ceilings, Outcome, in_order
from benchmarks.engines.plan import IN_TURNS, LINEARS, Plan
from dsv4.config import ModelConfig

Key = tuple[str, int]  # measure, tokens
WORKERS = ("dsv4", "transformers")


class Rounds:
    """Contenders in turns, measure by measure. Whatever else the machine does, it does to all of them."""

    def __init__(self, contenders: list[Contender], budget_s: float) -> None:
        self.contenders, self.budget_s = contenders, budget_s
        self.rates: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
        self.peaks: dict[tuple[str, int], int] = {}  # (contender, tokens)
        self.failures: dict[tuple[str, str, int], str] = {}
        self._spent: defaultdict[tuple[str, str, int], float] = defaultdict(float)
        self._longest: defaultdict[str, int] = defaultdict(int)

    def turn(self, number: int, keys: list[Key], advance: Advance) -> None:
        """One round: every contender at every measure that it can take and that is still worth another sample."""
        for measure, tokens in keys:
            for contender in self.contenders if number % 2 == 0 else self.contenders[::-1]:
                advance(f"round {number + 1}: {contender.name}, {measure} at {tokens:,}")
                if self._goes_on(contender, measure, tokens):
                    self._take(contender, measure, tokens, number)

    def depths_in_turns(self, contender: Contender, plan: Plan) -> None:
        """Decode at one depth after the other, again and again."""
        for turn in range(plan.turns):
            for depth in plan.depths if turn % 2 == 0 else plan.depths[::-1]:
                self._take(contender, IN_TURNS, depth, turn)

    def _goes_on(self, contender: Contender, measure: str, tokens: int) -> bool:
        key = (contender.name, measure, tokens)
        if not contender.can(measure, tokens) or key in self.failures or self._spent[key] >= self.budget_s:
            return False
        if key not in self.rates:
            return True
        rivals = (other.name for other in self.contenders if other.group == contender.group)
        first = {name: self.rates[name, measure, tokens][0] for name in rivals if (name, measure, tokens) in self.rates}
        return first[contender.name] == max(first.values())

    def _take(self, contender: Contender, measure: str, tokens: int, turn: int) -> None:
        key = (contender.name, measure, tokens)
        try:
            taken = contender.take(measure, tokens, turn)
        except BenchmarkError as error:
            if contender.name in WORKERS:
                raise
            self.failures[key] = f"{contender.name}, {measure} at {tokens:,} tokens: {error}"
            return
        self._spent[key] += taken.wall_s
        self.rates[key].append(taken.rate)
        # The peak of a process that stays is a length's own while no longer one came before.
        if taken.peak_bytes is not None and tokens >= self._longest[contender.name]:
            self.peaks[contender.name, tokens] = taken.peak_bytes
            if contender.name in WORKERS:
                self._longest[contender.name] = tokens + 1


def measure(
    model: str, config: ModelConfig, plan: Plan, threads: int, scratch: Path, llama: LlamaBench | None, advance: Advance
) -> Outcome:
    """Write the weights, compare the logits, then the rounds."""
    advance("weights")
    folders, ggufs = prepare(model, plan, scratch, threads, LINEARS if llama else ())
    with ExitStack() as stack:
        ceilings = Ceilings(stack.enter_context(WorkerProcess("ceilings", threads)), plan.ceilings)
        workers = {peer: stack.enter_context(WorkerProcess(peer, threads)) for peer in WORKERS}
        contenders: list[Contender] = []
        settings: dict[str, Any] = {}
        for peer, worker in workers.items():
            advance(f"load {peer}")
            contender = WorkerContender(worker, plan)
            contender.load(folders[peer])
            settings[peer] = contender.settings
            contenders.append(contender)
        advance("do the logits agree?")
        deviation = check_logits(workers, config.vocab_size, plan.agree, plan.agree_steps, scratch)
        if llama:
            for linears, file in ggufs.items():
                repack = not llama.needs_plain_weights(file)
                contenders += [LlamaContender(llama, file, linears, flash, repack, plan) for flash in (False, True)]
        rounds = Rounds(contenders, plan.budget_s)
        for number in range(plan.rounds):
            advance(f"round {number + 1}: what the machine can do")
            ceilings.measure()
            rounds.turn(number, keys(plan), advance)
        advance("dsv4, decode at all depths in turns")
        rounds.depths_in_turns(contenders[WORKERS.index("dsv4")], plan)
    if llama:
        settings["llama.cpp"] = llama.build
    rows = make_rows(rounds, config, ceilings.best())
    return Outcome(model, config, rows, ceilings.best(), settings, deviation, list(rounds.failures.values()))


def keys(plan: Plan) -> list[Key]:
    """Ascending, so that peaks of memory belong to their lengths."""
    return [*(("prefill", tokens) for tokens in plan.prefill), *(("decode", depth) for depth in plan.depths)]


def num_stages(plan: Plan, with_llama: bool) -> int:
    """How often `measure` calls `advance`."""
    contenders = len(WORKERS) + (2 * len(LINEARS) if with_llama else 0)
    return 3 + len(WORKERS) + plan.rounds * (1 + contenders * len(keys(plan)))


def make_rows(rounds: Rounds, config: ModelConfig, ceilings: dict[str, float]) -> list[Row]:
    """Rates and peaks with the machine's floors: weights as stored read once a token, operations at the matrix rate."""
    weights = floors.token_bytes(config)
    rows: list[Row] = []
    for (name, what, tokens), rates in rounds.rates.items():
        if what in ("decode", IN_TURNS):
            floor = ceilings["read_bytes_per_s"] / weights
        else:
            floor = tokens * floors.matrix_rate(ceilings) / floors.prefill_flops(config, tokens)
        rows.append(Row(name, what, tokens, "tok/s", rates, floor))
    stored = float(floors.stored_bytes(config))
    rows += [
        Row(name, "peak memory", tokens, "bytes", [float(peak)], stored)
        for (name, tokens), peak in rounds.peaks.items()
        if tokens
    ]
    return in_order(rows)
