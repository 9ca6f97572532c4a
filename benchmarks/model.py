"""`dsv4 bench model`: dsv4 against transformers' DeepseekV4ForCausalLM, same random weights, fp32, same threads.

Each contender is a process of its own, so that its memory and its BLAS settings are its own. Rounds interleave:
whatever else the machine does, it does to both. Nothing is reported unless the frozen tests
are green and the logits agree.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks.comparison import floors, report
from benchmarks.comparison.gate import check_logits, run_tests
from benchmarks.comparison.plan import FOLDERS, FULL, PEERS, QUICK, TARGETS, Plan
from benchmarks.comparison.process import ROOT, BenchmarkError, WorkerProcess
from benchmarks.comparison.progress import Advance, progress_bar
from benchmarks.comparison.rows import Row, append_rows, commit, hardware, hardware_slug, package_digest
from dsv4.analysis.parameters import count_parameters

DESCRIPTION = "Compare dsv4 with transformers: decode, prefill and memory, same weights, fp32, side by side."
SEED = 1
WARM_UP = 64  # tokens of the first forward of every process, not counted
Samples = defaultdict[tuple[str, str, int], list[float]]  # (peer, measure, tokens) -> seconds or bytes


class Comparison:
    """One run: `measure()` fills `samples` (seconds, bytes), `rows()` turns them into figures with their floors."""

    def __init__(self, plan: Plan, threads: int, scratch: Path, advance: Advance) -> None:
        self.plan, self.threads, self.scratch, self.advance = plan, threads, scratch, advance
        self.samples: Samples = defaultdict(list)
        self.ceilings: dict[str, list[float]] = defaultdict(list)
        self.settings: dict[str, dict[str, object]] = {}
        self.deviation = float("nan")

    def measure(self) -> None:
        self._together()
        for turn in range(self.plan.fresh_rounds):
            for peer in self._order(turn):
                self._fresh(peer, self.plan.fresh_length)
        self._fresh("transformers", self.plan.fresh_small)
        self._fresh("dsv4", self.plan.long_length)

    def _order(self, turn: int) -> tuple[str, ...]:
        return PEERS if turn % 2 == 0 else PEERS[::-1]

    def _load(self, worker: WorkerProcess) -> None:
        answer = worker.ask("load", folder=str(self.scratch / FOLDERS[worker.peer]))
        self.settings[worker.peer] = answer["settings"]
        worker.ask("prefill", length=WARM_UP, seed=SEED)

    def _together(self) -> None:
        """Both contenders alive, their short measures taking turns."""
        plan, keep = self.plan, self.samples
        with ExitStack() as stack:
            workers = {peer: stack.enter_context(WorkerProcess(peer, self.threads)) for peer in PEERS}
            self.advance("random weights")
            config = plan.config.to_dict(quantized=False)
            workers["dsv4"].ask("write", config=config, scratch=str(self.scratch), seed=SEED)
            for peer, worker in workers.items():
                self.advance(f"load {peer}")
                self._load(worker)
            self.advance("do the logits agree?")
            self.deviation = check_logits(workers, plan.config.vocab_size, plan.agree, plan.agree_steps, self.scratch)
            for worker in workers.values():
                worker.ask("decode", prompt=plan.prompt, steps=2, seed=SEED)
            for turn in range(plan.rounds):
                self.advance(f"round {turn + 1}: what the machine can do")
                # In the process without MKL settings, while the other waits.
                size = {"megabytes": 256, "size": 2048} if plan is FULL else {"megabytes": 8, "size": 256}
                for name, value in workers["transformers"].ask("ceilings", **size).items():
                    self.ceilings[name].append(value)
                for peer in self._order(turn):
                    worker = workers[peer]
                    self.advance(f"round {turn + 1}: {peer} decodes")
                    answer = worker.ask("decode", prompt=plan.prompt, steps=plan.steps, seed=SEED + turn)
                    keep[peer, "decode", plan.prompt].append(answer["seconds"] / plan.steps)
                for length in plan.prefill:
                    for peer in self._order(turn):
                        self.advance(f"round {turn + 1}: {peer} reads {length:,} tokens")
                        answer = workers[peer].ask("prefill", length=length, seed=SEED + turn)
                        keep[peer, "prefill", length].append(answer["seconds"])

    def _fresh(self, peer: str, length: int) -> None:
        """A new process, one prompt: its time (where no other process measured that) and the process's peak memory."""
        self.advance(f"new process: {peer} reads {length:,} tokens")
        with WorkerProcess(peer, self.threads) as worker:
            self._load(worker)
            answer = worker.ask("prefill", length=length, seed=SEED)
            if length not in self.plan.prefill:
                self.samples[peer, "prefill", length].append(answer["seconds"])
            self.samples[peer, "peak memory", length].append(worker.ask("memory")["peak_bytes"])

    def best_ceilings(self) -> dict[str, float]:
        return {name: max(values) for name, values in self.ceilings.items()}

    def rows(self) -> list[Row]:
        config, ceilings = self.plan.config, self.best_ceilings()
        rows: list[Row] = []
        for (peer, measure, tokens), samples in self.samples.items():
            if measure == "peak memory":
                row = Row(peer, measure, tokens, "bytes", samples, floors.memory_floor(config))
            elif measure == "decode":
                row = Row(
                    peer, measure, tokens, "tok/s", [1 / s for s in samples], 1 / floors.decode_floor(config, ceilings)
                )
            else:
                floor = tokens / floors.prefill_floor(config, tokens, ceilings)
                row = Row(peer, measure, tokens, "tok/s", [tokens / s for s in samples], floor)
            rows.append(row)
        order = {"decode": 0, "prefill": 1, "peak memory": 2}
        return sorted(rows, key=lambda row: (order[row.measure], row.tokens, row.peer))


def num_stages(plan: Plan) -> int:
    """How often a comparison calls `advance`."""
    return 4 + plan.rounds * (3 + 2 * len(plan.prefill)) + 2 * plan.fresh_rounds + 2


def run(plan: Plan, threads: int, results: Path, gated: bool, console: Console) -> None:
    """Gate, measure, print, append to results/<hardware>.jsonl, draw results/prefill.png."""
    code, sources = commit(), package_digest()
    if gated:
        console.print("Frozen tests first: no number without them.")
        run_tests()
    with (
        tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch,
        progress_bar(console, num_stages(plan)) as advance,
    ):
        comparison = Comparison(plan, threads, Path(scratch), advance)
        comparison.measure()
    if package_digest() != sources:
        raise BenchmarkError("dsv4/ changed during the run, so its figures belong to no version of it: no rows")
    machine, rows = hardware(), comparison.rows()
    found, ceilings = report.index(rows), comparison.best_ceilings()
    small, large = (found["transformers", "peak memory", length] for length in (plan.fresh_small, plan.fresh_length))
    growth = floors.extrapolate((small.tokens, small.median), (large.tokens, large.median), plan.long_length)
    common = {
        "benchmark": "model",
        "plan": plan.name,
        "gated": gated,
        "commit": code,
        "parameters": count_parameters(plan.config).total,
        "shape": plan.config.to_dict(quantized=False),
        "dtype": "float32",
        "threads": threads,
        "settings": comparison.settings,
        "hardware": machine,
        "ceilings": ceilings,
        "logits_deviation": comparison.deviation,
    }
    file = results / f"{hardware_slug(machine)}.jsonl"
    append_rows(file, [*rows, *target_rows(found)], common)
    title = (
        f"{common['parameters'] / 1e6:.1f}M parameters, fp32, {threads} threads; medians ± half the range; "
        f"logits agree to {comparison.deviation:.0e}" + ("" if gated else "; UNGATED: tests not run")
    )
    console.print(report.table(found, title))
    console.print(report.ceilings_text(ceilings))
    console.print(report.growth_text(growth, plan.long_length, machine["memory_bytes"]))
    console.print(f"{machine['cpu']}, {machine['cores']} cores; commit {code}; rows in {file}")
    if not report.plot_prefill(found, results / "prefill.png"):
        console.print("no plot: matplotlib is not installed")


def target_rows(found: report.Rows) -> list[Row]:
    """Each target that was measured, as a row of its own: the ratio (or dsv4's bytes) against the bound."""
    rows: list[Row] = []
    for target in TARGETS:
        result = report.verdict(found, target)
        if result is not None:
            value, met = result
            extra = {"at_least": target.at_least, "met": met}
            rows.append(Row("target", target.measure, target.tokens, target.unit, [value], target.bound, extra=extra))
    return rows


def _console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=132)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench model", description=DESCRIPTION)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, one round: does it run?")
    parser.add_argument("--threads", type=int, default=2, help="of each contender; default: %(default)s")
    parser.add_argument("--no-gate", action="store_true", help="do not run the frozen tests; the rows say so")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: at least 1")
    try:
        run(QUICK if options.quick else FULL, options.threads, options.results, not options.no_gate, _console())
    except BenchmarkError as error:
        print(f"dsv4 bench model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
