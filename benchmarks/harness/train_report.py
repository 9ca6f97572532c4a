"""Runs of `dsv4 bench train` as Markdown tables, for the terminal and docs/benchmarks.md."""

from __future__ import annotations

from benchmarks.harness.report import table
from benchmarks.harness.results import Row, Run
from benchmarks.harness.train_rounds import GRADIENT, PART, PEAK

SCENARIOS = ("train slice", "train nano")
THEIRS = "transformers"


def command(run: Run) -> str:
    if run.scenario == "train nano":
        return "`dsv4 bench train nano --corpus CORPUS --before CHECKOUT`"
    busy, policy = run.settings["busy"], run.settings.get("recompute", "none")
    return f"`dsv4 bench train{' --busy' if busy else ''}{f' --recompute {policy}' if policy != 'none' else ''}`"


def lines(run: Run) -> list[str]:
    """Description, tables and notes of one run."""
    if run.scenario == "train nano":
        return [f"nano's recipe, tokens/s, medians ± half the range{run.warning}.", "", *_nano(run), ""]
    unit = "tokens per processor second" if run.settings["busy"] else "tokens/s"
    about = f"120.9M random parameters, {unit}, {run.threads} threads, medians ± half the range{run.warning}."
    notes = [
        f"Whole step: {run.settings['step']}, ours with Muon, transformers with AdamW."
        if "step" in run.settings
        else "",
        f"Peaks are of processes of their own. Floor: operations of the model, without recomputation, {_floor(run)} "
        "dsv4 computes in fp32, dsv4 bf16 multiplies BF16 numbers, dsv4 fp8 simulates FP8.",
    ]
    return [about, "", *_rates(run), "", *_parts(run), "", *(note for note in notes if note), ""]


def _floor(run: Run) -> str:
    """The rates of products that the floors are of; earlier runs measured them once, and none per processor."""
    giga = {name: value / 1e9 for name, value in run.ceilings.items()}
    both = f"fp32 {giga['fp32_flop_per_s']:.0f} and BF16 {giga['bf16_flop_per_s']:.0f} GFLOP/s"
    if "fp32_flop_per_processor_s" not in giga:
        return (
            f"at the rate of matrix products, {both}; of parts in processor time. This rate was measured once, before "
            "the rest, by wall time on a machine with other work, and Muon's floor in fp32 is of fp32 though it "
            "multiplied BF16: so shares of more than 100 % say that the floor is too high."
        )
    alone = " and ".join(f"{giga[f'{name}_flop_per_processor_s']:.0f}" for name in ("fp32", "bf16"))
    return (
        f"at the best rate of large products in the run, {both}; of parts {alone} per second of a processor. Muon "
        "multiplies BF16 where that is fast."
    )


def _rates(run: Run) -> list[str]:
    """One line per figure: each contender, our share of the floor and our lead."""
    peers = list(dict.fromkeys(row.peer for row in run.rows))
    ours = [peer for peer in peers if peer != THEIRS]
    rows: list[list[str]] = []
    for what, tokens in dict.fromkeys(
        (row.measure, row.tokens) for row in run.rows if not row.measure.startswith(PART)
    ):
        found = {row.peer: row for row in run.rows if (row.measure, row.tokens) == (what, tokens)}
        theirs, cells = found.get(THEIRS), [_name(run, what, tokens)]
        for peer in ours:
            row = found.get(peer)
            cells += ["", ""] if row is None else [_figure(row), _lead(row, theirs)]
        rows.append([*cells, _figure(theirs) if theirs else ""])
    head = ["", *(cell for peer in ours for cell in (peer, "ahead")), THEIRS]
    return table(head, rows)


def _name(run: Run, what: str, tokens: int) -> str:
    shape = run.settings["shapes"].get(str(tokens), "") if what.endswith(GRADIENT) else f"{tokens:,} tokens"
    return f"{what}, {shape}"


def _figure(row: Row) -> str:
    if row.measure.startswith(PEAK):
        return f"{row.median / 1e9:.2f} GB"
    share = f", {100 * row.median / row.floor:.0f} % of floor" if row.floor and row.peer != THEIRS else ""
    return f"{row.median:,.0f}{row.spread}{share}"


def _lead(row: Row, theirs: Row | None) -> str:
    if theirs is None:
        return ""
    ratio = row.median / theirs.median
    return f"{ratio:.2f} of theirs" if row.measure.startswith(PEAK) else f"{ratio:.2f}"


def _parts(run: Run) -> list[str]:
    """One line per part of a step: milliseconds of a processor, the floor, the share reached."""
    rows: list[list[str]] = []
    for row in run.rows:
        if row.measure.startswith(PART):
            what, part = row.measure.removeprefix(f"{PART}, ").split(": ")
            share = f"{100 * row.floor / row.median:.0f} %" if row.floor else ""
            least = f"{1000 * row.floor:,.0f}" if row.floor else ""
            step = _name(run, what, row.tokens)
            rows.append([f"{row.peer}, {step}: {part}", f"{1000 * row.median:,.0f}", least, share])
    return table(["ms of a processor", "took", "floor", "reached"], rows) if rows else []


def _nano(run: Run) -> list[str]:
    ours, before = run.find("dsv4", "nano", 0), run.find("before", "nano", 0)
    cells = ["nano", _figure(ours) if ours else ""]
    if ours and before:
        return table(["", "dsv4", "before", "ratio"], [[*cells, _figure(before), f"{ours.median / before.median:.2f}"]])
    return table(["", "dsv4"], [cells])
