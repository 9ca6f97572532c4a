"""flash-width: two layers at Flash's exact widths, dsv4 against what the machine can do."""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparison import floors
from benchmarks.comparison.process import WorkerProcess
from benchmarks.comparison.progress import Advance
from benchmarks.comparison.rows import Row
from benchmarks.engines.contenders import SEED, WorkerContender
from benchmarks.engines.outcome import Ceilings, Outcome, in_order
from benchmarks.engines.plan import Plan

SLACK_BYTES = 8 * 10**9  # of addresses: libraries, threads, cache


def measure(plan: Plan, threads: int, scratch: Path, advance: Advance) -> Outcome:
    """Decode as bytes of weights a second beside a copy, prefill as operations a second beside matrix products."""
    config, folder = plan.wide, scratch / "flash-width"
    stored = floors.stored_bytes(config)
    advance(f"random weights, {stored / 1e9:.1f} GB")
    with WorkerProcess("dsv4", threads) as writer:
        writer.ask("random", config=config.to_dict(), folder=str(folder), seed=SEED)
    rates: dict[str, list[float]] = {"prefill": [], "decode": []}
    with WorkerProcess("ceilings", threads) as machine, WorkerProcess("dsv4", threads) as worker:
        ceilings = Ceilings(machine, plan.ceilings)
        advance("load dsv4")
        # The file mapped and one copy of it fit; widened to fp32, Flash's widths would starve the machine.
        worker.ask("limit", num_bytes=2 * stored + SLACK_BYTES)
        contender = WorkerContender(worker, plan)
        contender.load(folder)
        advance("every weight read once")
        contender.take("prefill", plan.wide_prompt, 0)  # not counted: it brings the mapped file into memory
        for turn in range(plan.rounds):
            advance(f"round {turn + 1}: what the machine can do")
            ceilings.measure()
            for what, found in rates.items():
                advance(f"round {turn + 1}: {what}, {plan.wide_prompt:,} tokens")
                found.append(contender.take(what, plan.wide_prompt, turn).rate)
        peak = worker.ask("memory")["peak_bytes"]
    best = ceilings.best()
    rows = make_rows(plan, rates, best)
    rows.append(Row("dsv4", "peak memory", plan.wide_prompt, "bytes", [float(peak)], float(stored)))
    return Outcome("flash-width", config, in_order(rows), best, {"dsv4": contender.settings})


def num_stages(plan: Plan) -> int:
    return 3 + 3 * plan.rounds


def make_rows(plan: Plan, rates: dict[str, list[float]], ceilings: dict[str, float]) -> list[Row]:
    """Tokens a second, and the same as bytes and operations a second against the ceilings of the run."""
    config, tokens = plan.wide, plan.wide_prompt
    weights, work = floors.token_bytes(config), floors.prefill_flops(config, tokens) / tokens
    copy, matrix = ceilings["copy_bytes_per_s"], floors.matrix_rate(ceilings)
    moved = [rate * weights for rate in rates["decode"]]
    computed = [rate * work for rate in rates["prefill"]]
    return [
        Row("dsv4", "decode", tokens, "tok/s", rates["decode"], copy / weights),
        Row("dsv4", "prefill", tokens, "tok/s", rates["prefill"], matrix / work),
        Row("dsv4", "weights read, of a copy's bytes", tokens, "bytes/s", moved, copy),
        Row("dsv4", "operations, of the faster torch.mm", tokens, "FLOP/s", computed, matrix),
        *(
            Row("dsv4", f"operations, of {name} torch.mm", tokens, "FLOP/s", computed, ceilings[f"{key}_flop_per_s"])
            for name, key in (("fp32", "fp32"), ("BF16", "bf16"))
        ),
    ]
