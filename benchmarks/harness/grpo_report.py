"""Runs of `dsv4 bench grpo` as a Markdown table, for the terminal and docs/benchmarks.md."""

from __future__ import annotations

from benchmarks.harness.grpo_rounds import PEAK
from benchmarks.harness.policy_trainers import MUON, TRL
from benchmarks.harness.report import table
from benchmarks.harness.results import Row, Run

SCENARIO = "grpo"


def command(run: Run) -> str:
    trl = ' --trl "$(make trl | tail -n 1)"' if any(row.peer == TRL for row in run.rows) else ""
    return f"`dsv4 bench grpo{' --busy' if run.settings['busy'] else ''}{trl}`"


def lines(run: Run) -> list[str]:
    """Description, table and notes of one run."""
    shape = run.settings["shape"]
    unit = "sampled tokens per processor second" if run.settings["busy"] else "sampled tokens/s"
    about = (
        f"nano, {unit}, {run.threads} threads, medians ± half the range{run.warning}. A step: "
        f"{shape['prompts']} prompts of {run.settings['prompt']} tokens, {shape['group']} answers each, "
        f"{shape['tokens']} tokens per answer, {shape['updates']} updates."
    )
    peers = list(dict.fromkeys(row.peer for row in run.rows))
    ours = [peer for peer in peers if peer != TRL]
    rows: list[list[str]] = []
    for what in dict.fromkeys(row.measure for row in run.rows):
        found = {row.peer: row for row in run.rows if row.measure == what}
        theirs, cells = found.get(TRL), [what]
        for peer in ours:
            cells += [_figure(found[peer]), _lead(found[peer], theirs)]
        rows.append([*cells, _figure(theirs) if theirs else ""])
    apart: dict[str, float | None] = run.settings["differences"]
    cells = ["train/serve difference"]
    for peer in ours:
        cells += [_difference(apart[peer]), ""]
    rows.append([*cells, _difference(apart.get(TRL))])
    if (even := apart.get(f"{TRL}, even")) is not None:
        rows.append(["the same, prompts of one length", *("" for _ in cells[1:]), _difference(even)])
    note = (
        f"{MUON}: as `dsv4 train grpo` runs, stored FP4 and FP8 weights, Muon. With adamw: fp32 weights and AdamW, as "
        "TRL. Difference: the largest of a log-probability between sampling and the first update, in the first step. "
        f"Floor: operations at {run.ceilings['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s in fp32, Muon's at the faster rate. "
        "Peaks are of whole processes."
    )
    return [about, "", *table(["", *(cell for peer in ours for cell in (peer, "ahead")), TRL], rows), "", note, ""]


def _figure(row: Row) -> str:
    if row.measure == PEAK:
        return f"{row.median / 1e9:.2f} GB"
    share = f", {100 * row.median / row.floor:.1f} % of floor" if row.peer != TRL else ""
    return f"{row.median:,.1f}{row.spread}{share}"


def _lead(row: Row, theirs: Row | None) -> str:
    if theirs is None:
        return ""
    ratio = row.median / theirs.median
    return f"{ratio:.2f} of theirs" if row.measure == PEAK else f"{ratio:.2f}"


def _difference(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
