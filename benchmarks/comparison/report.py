"""Rows -> the table, the targets, the plot."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from benchmarks.comparison.floors import Growth
from benchmarks.comparison.plan import PEERS, TARGETS, Target
from benchmarks.comparison.rows import Row

Rows = dict[tuple[str, str, int], Row]  # by peer, measure, tokens


def index(rows: Iterable[Row]) -> Rows:
    return {(row.peer, row.measure, row.tokens): row for row in rows}


def ratio(rows: Rows, measure: str, tokens: int) -> float | None:
    """dsv4's median over transformers', None where one of them has no row."""
    ours, theirs = (rows.get((peer, measure, tokens)) for peer in PEERS)
    return ours.median / theirs.median if ours and theirs else None


def verdict(rows: Rows, target: Target) -> tuple[float, bool] | None:
    """(value, reached) of a target, None where it was not measured."""
    if target.unit == "x":
        value = ratio(rows, target.measure, target.tokens)
    else:
        row = rows.get(("dsv4", target.measure, target.tokens))
        value = row.median if row else None
    return None if value is None else (value, target.met(value))


def _figure(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.unit == "bytes":
        value = f"{row.median / 1e9:.3f} GB"
    else:
        value = f"{row.median:,.1f} tok/s" if row.median < 1000 else f"{row.median:,.0f} tok/s"
    return value + (f" ±{50 * row.spread:.0f} %" if len(row.samples) > 1 else "")


def _target_text(target: Target) -> str:
    bound = f"{target.bound:g} x" if target.unit == "x" else f"{target.bound / 1e9:g} GB"
    return f"{'>=' if target.at_least else '<='} {bound}"


def table(rows: Rows, title: str) -> Table:
    """One line a measure: both contenders (median, half the range), the ratio, the target, times the floor."""
    out = Table(title=title, title_justify="left")
    for name in ("measure", "dsv4", "transformers", "ratio", "target", "", "dsv4/floor", "transf./floor"):
        out.add_column(name, justify="left" if name in ("measure", "") else "right", no_wrap=True)
    targets = {(target.measure, target.tokens): target for target in TARGETS}
    for measure, tokens in dict.fromkeys((measure, tokens) for _, measure, tokens in rows):
        ours, theirs = (rows.get((peer, measure, tokens)) for peer in PEERS)
        quotient, target = ratio(rows, measure, tokens), targets.get((measure, tokens))
        reached = verdict(rows, target) if target else None
        out.add_row(
            f"{measure}, {tokens:,} tokens",
            _figure(ours),
            _figure(theirs),
            "-" if quotient is None else f"{quotient:.2f} x",
            _target_text(target) if target else "",
            "" if reached is None else "[green]met[/]" if reached[1] else "[red]missed[/]",
            f"{ours.over_floor:.1f} x" if ours else "-",
            f"{theirs.over_floor:.1f} x" if theirs else "-",
        )
    return out


def ceilings_text(ceilings: dict[str, float]) -> str:
    giga = {name: value / 1e9 for name, value in ceilings.items()}
    return (
        f"Machine: copy {giga['copy_bytes_per_s']:.1f} GB/s, read {giga['read_bytes_per_s']:.1f} GB/s, matrix product "
        f"fp32 {giga['fp32_flop_per_s']:.0f} and BF16 {giga['bf16_flop_per_s']:.0f} GFLOP/s. Floors: a token's weights "
        "read once (decode), operations at the fp32 rate (prefill), all weights (memory)."
    )


def growth_text(growth: Growth, length: int, memory_bytes: int) -> str:
    """Why transformers has no figure at the long length."""
    line, parabola = (f"{value / 1e9:,.{0 if value > 1e10 else 2}f} GB" for value in (growth.line, growth.parabola))
    return (
        f"transformers at {length:,} tokens: not attempted. Its two measured peaks put it at {line} along a straight "
        f"line, which is too little, and at {parabola} if it grows with the square, as attention scores of whole "
        f"prompts do; this machine has {memory_bytes / 1e9:.0f} GB."
    )


def plot_prefill(rows: Rows, file: Path) -> bool:
    """Prefill tokens a second against length, both contenders and dsv4's floor; False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ticks: list[int] = []
    for peer in PEERS:
        found = sorted(
            (row for row in rows.values() if (row.peer, row.measure) == (peer, "prefill")), key=lambda row: row.tokens
        )
        lengths = [row.tokens for row in found]
        low = [row.median - min(row.samples) for row in found]
        high = [max(row.samples) - row.median for row in found]
        axes.errorbar(lengths, [row.median for row in found], yerr=[low, high], marker="o", capsize=3, label=peer)
        if peer == "dsv4":
            axes.plot(lengths, [row.floor for row in found], "k:", label="operations at the fp32 matrix rate")
            ticks = lengths
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.minorticks_off()
    axes.set(xlabel="prompt, tokens", ylabel="prefill, tokens a second", title="Prefill, fp32, CPU")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return True
