"""Runs as Markdown tables, for the terminal and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.machine import prefill_flops, token_bytes
from benchmarks.harness.results import Row, Run
from benchmarks.harness.scenarios import SCENARIOS, Scenario, quick

PEERS = ("llama.cpp", "transformers")


def lines(run: Run) -> list[str]:
    """Description, table and notes of one run."""
    scenario = quick(SCENARIOS[run.scenario]) if run.quick else SCENARIOS[run.scenario]
    table = _by_length(run) if scenario.marks else _alone(run, scenario) if _is_alone(run) else _versus(run)
    agree = "" if run.deviation is None else f"; logits agree to {run.deviation:.0e}"
    about = SCENARIOS[run.scenario].about
    head = f"{about[0].upper()}{about[1:]}. {run.threads} threads, medians ± half the range{agree}{run.warning}."
    return [head, "", *table, "", *_notes(run), ""]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with padded columns; all but the first are right-aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def figure(row: Row | None) -> str:
    """Median and, for several rounds, half the range in percent of the median."""
    if row is None:
        return ""
    if row.measure == "peak memory":
        return f"{row.median / 1e9:.2f} GB"
    return f"{row.median:,.{1 if row.median < 100 else 0}f}{row.spread}"


def _is_alone(run: Run) -> bool:
    return not any(row.peer.startswith(PEERS) for row in run.rows)


def _versus(run: Run) -> list[str]:
    """One line per measure: dsv4, its share of the floor, each other contender and dsv4's ratio to it."""
    peers = [peer for peer in PEERS if any(row.peer.startswith(peer) for row in run.rows)]
    out: list[list[str]] = []
    for measure, tokens in dict.fromkeys((row.measure, row.tokens) for row in run.rows):
        ours = run.find("dsv4", measure, tokens)
        if ours is None:
            continue
        cells = [f"{measure}, {tokens:,}", figure(ours), _share(ours)]
        for peer in peers:
            times = run.ratio(peer, measure, tokens)
            cells += [figure(run.find(peer, measure, tokens)), "" if times is None else f"{times:.2f}"]
        out.append(cells)
    return table(["tokens per second", "dsv4", "of floor", *(c for peer in peers for c in (peer, "ratio"))], out)


def _alone(run: Run, scenario: Scenario) -> list[str]:
    """One line per measure: the rate, and its share of a copy's bandwidth or of torch.mm's operations."""
    out: list[list[str]] = []
    config, ceilings = scenario.config, run.ceilings
    for row in run.rows:
        if row.measure == "decode":
            moved = row.median * token_bytes(config, "official")
            share = f"{moved / 1e9:.1f} GB/s, {100 * moved / ceilings['copy_bytes_per_s']:.0f} % of a copy"
        elif row.measure == "prefill":
            done = row.median * prefill_flops(config, row.tokens) / row.tokens
            of = [f"{100 * done / ceilings[f'{key}_flop_per_s']:.0f} % of {key} mm" for key in ("bf16", "fp32")]
            share = f"{done / 1e9:.0f} GFLOP/s, {', '.join(of)}"
        else:
            share = f"{row.median / row.floor:.2f} of the weights"
        out.append([f"{row.peer}: {row.measure}, {row.tokens:,}", figure(row), share])
    return table(["tokens per second", "dsv4", "of the machine"], out)


def _by_length(run: Run) -> list[str]:
    """One line per length: prefill up to it, decode at it, peak memory so far and the KV formula's bytes."""
    out: list[list[str]] = []
    for tokens in sorted({row.tokens for row in run.rows}):
        prefill, decode, peak = (run.find("dsv4", what, tokens) for what in ("prefill", "decode", "peak memory"))
        assert peak is not None
        above = f"{(peak.median - peak.floor) / 1e9:.3f} GB"
        out.append([f"{tokens:,}", figure(prefill), figure(decode), figure(peak), f"{peak.floor / 1e9:.3f} GB", above])
    return table(["tokens", "prefill, tokens/s", "decode, tokens/s", "peak memory", "KV formula", "above it"], out)


def _share(row: Row) -> str:
    share = row.median / row.floor
    return f"{share:.2f} x" if row.measure == "peak memory" else f"{100 * share:.0f} %"


def _notes(run: Run) -> list[str]:
    """llama.cpp's best settings, failures, and the machine's ceilings."""
    keys = dict.fromkeys((row.measure, row.tokens) for row in run.rows if row.measure != "peak memory")
    best = [(key, run.find("llama.cpp", *key)) for key in keys]
    named = [f"{measure} {tokens:,} {row.peer.split(' ', 1)[1]}" for (measure, tokens), row in best if row]
    giga = {name: value / 1e9 for name, value in run.ceilings.items()}
    return [
        *(["llama.cpp at its best (linears; fa: flash attention): " + ", ".join(named) + "."] if named else []),
        *(f"Failed: {text}" for text in run.failures),
        f"Machine: copy {giga['copy_bytes_per_s']:.1f} GB/s, read {giga['read_bytes_per_s']:.1f} GB/s, matrix product "
        f"fp32 {giga['fp32_flop_per_s']:.0f} and BF16 {giga['bf16_flop_per_s']:.0f} GFLOP/s. Floors: the weights of a "
        "token read once (decode), operations at the faster rate (prefill), stored weights (memory).",
    ]
