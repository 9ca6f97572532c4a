"""flash-width: two layers at Flash's exact widths, dsv4 against what the machine can do."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from benchmarks.comparison import floors
from benchmarks.comparison.process import WorkerProcess
from benchmarks.comparison.progress import Advance
from benchmarks.comparison.rows import Row
from benchmarks.engines.contenders import SEED, WorkerContender
from benchmarks.engines.outcome import Ceilings, Outcome, in_order
from benchmarks.engines.plan import Plan

NUMERICS = ("float", "shipped")  # shipped rounds activations to FP8, which tiles take in one product instead of three
SLACK_BYTES = 8 * 10**9  # of addresses: libraries, threads, cache


def measure(plan: Plan, threads: int, scratch: Path, advance: Advance) -> Outcome:
    """Decode as bytes of weights a second beside a copy, prefill as operations a second beside matrix products."""
    config, folder = plan.wide, scratch / "flash-width"
    stored = floors.stored_bytes(config)
    advance(f"random weights, {stored / 1e9:.1f} GB")
    with WorkerProcess("dsv4", threads) as writer:
        writer.ask("random", config=config.to_dict(), folder=str(folder), seed=SEED)
    rows: list[Row] = []
    with ExitStack() as stack:
        ceilings = Ceilings(stack.enter_context(WorkerProcess("ceilings", threads)), plan.ceilings)
        contenders = []
        for numerics in NUMERICS:
            worker = stack.enter_context(WorkerProcess("dsv4", threads))
            advance(f"load dsv4, {numerics}")
            # The file mapped and one copy of it fit; widened to fp32, Flash's widths would starve the machine.
            worker.ask("limit", num_bytes=2 * stored + SLACK_BYTES)
            contenders.append(WorkerContender(worker, plan, numerics))
            contenders[-1].load(folder)
            advance("every weight read once")
            contenders[-1].take("prefill", plan.wide_prompt, 0)  # not counted: it brings the mapped file into memory
        rates: dict[str, dict[str, list[float]]] = {c.name: {"prefill": [], "decode": []} for c in contenders}
        for turn in range(plan.rounds):
            advance(f"round {turn + 1}: what the machine can do")
            ceilings.measure()
            for contender in contenders:
                for what, found in rates[contender.name].items():
                    advance(f"round {turn + 1}: {contender.name}, {what}, {plan.wide_prompt:,} tokens")
                    found.append(contender.take(what, plan.wide_prompt, turn).rate)
        best = ceilings.best()
        for contender in contenders:
            peak = contender.worker.ask("memory")["peak_bytes"]
            rows += make_rows(plan, contender.name, rates[contender.name], best)
            rows.append(Row(contender.name, "peak memory", plan.wide_prompt, "bytes", [float(peak)], float(stored)))
    settings = {contender.name: contender.settings for contender in contenders}
    return Outcome("flash-width", config, in_order(rows), best, settings)


def num_stages(plan: Plan) -> int:
    return 1 + 2 * len(NUMERICS) + (1 + 2 * len(NUMERICS)) * plan.rounds


def make_rows(plan: Plan, name: str, rates: dict[str, list[float]], ceilings: dict[str, float]) -> list[Row]:
    """Tokens a second, and the same as bytes and operations a second against the ceilings of the run."""
    config, tokens = plan.wide, plan.wide_prompt
    weights, work = floors.token_bytes(config), floors.prefill_flops(config, tokens) / tokens
    copy, matrix = ceilings["copy_bytes_per_s"], floors.matrix_rate(ceilings)
    moved = [rate * weights for rate in rates["decode"]]
    computed = [rate * work for rate in rates["prefill"]]
    return [
        Row(name, "decode", tokens, "tok/s", rates["decode"], copy / weights),
        Row(name, "prefill", tokens, "tok/s", rates["prefill"], matrix / work),
        Row(name, "weights read, of a copy's bytes", tokens, "bytes/s", moved, copy),
        Row(name, "operations, of the faster torch.mm", tokens, "FLOP/s", computed, matrix),
        *(
            Row(name, f"operations, of {product} torch.mm", tokens, "FLOP/s", computed, ceilings[f"{key}_flop_per_s"])
            for product, key in (("fp32", "fp32"), ("BF16", "bf16"))
        ),
    ]
