"""Plots of serving, one picture per processor: load, first tokens of repeated prompts, an agent's turns."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import agent, prefix
from benchmarks.harness.plot import COLOURS, STYLES
from benchmarks.harness.results import Run, newest, read
from benchmarks.harness.serving_report import PEERS, sections
from dsv4.training.plots import new_figure

TOTAL, FIRST = "total tokens", "first token, median"


def plot_serving(results: Path) -> list[Path]:
    """Draw results/<hardware>-serving.png for each processor with such runs; nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    drawn: list[Path] = []
    for file in sorted(results.glob("*.jsonl")):
        runs = sections(newest(read(file)))
        if runs:
            drawn.append(file.with_name(f"{file.stem}-serving.png"))
            draw(runs, drawn[-1])
    return drawn


def draw(runs: Any, picture: Path) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = new_figure(12.0, 8.0)
    (rate, wait), (source, turns) = figure.subplots(2, 2)
    for run in runs:
        _, subject, model = run.scenario.split()
        if subject == "load":
            _load(rate, run, model, TOTAL, "prompt and answer tokens per second")
            _load(wait, run, model, FIRST, "median time to first token, s")
        elif subject == "prefix":
            _prefix(source, run, model)
        elif subject == "agent":
            _agent(turns, run, model)
    turns.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for axis in (rate.yaxis, wait.yaxis, turns.yaxis, source.xaxis):
        axis.set_major_formatter(plain)
    rate.margins(y=0.15)  # room for its legend, in one line above flat curves
    for axes in (rate, wait, source, turns):
        axes.grid(alpha=0.3, axis="both" if axes is not source else "x")
        if axes.has_data():
            axes.legend(**({"fontsize": 8, "ncol": 3} if axes is rate else {"fontsize": 9}))
        else:
            axes.set_axis_off()
    figure.savefig(picture, dpi=130)


def _load(axes: Any, run: Run, model: str, measure: str, title: str) -> None:
    levels = sorted({row.tokens for row in run.rows})
    for peer in ("dsv4", *PEERS):
        found = [(level, row) for level in levels if (row := run.find(peer, measure, level))]
        if found:
            axes.plot(
                [level for level, _ in found],
                [row.median for _, row in found],
                color=COLOURS[peer], linestyle=STYLES[model], marker="o", markersize=4.5, label=f"{peer}, {model}",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(levels, [f"{level}" for level in levels])
    axes.minorticks_off()
    axes.set_xlabel("requests at a time")
    axes.set_title(title, fontsize=11)


def _prefix(axes: Any, run: Run, model: str) -> None:
    """Bars of milliseconds by source, with the stored bytes beside them."""
    rows = [row for row in run.rows if row.measure == prefix.MEASURE]
    names = [f"{row.peer}, {model}" for row in rows]
    bars = axes.barh(names, [1000 * row.median for row in rows], label=f"{rows[0].tokens:,} tokens, {model}")
    labels: list[str] = []
    for row in rows:
        size = run.find(row.peer, prefix.BYTES, row.tokens)
        stored = "" if size is None else f", {size.median / 1e6:.1f} MB"
        labels.append(f" {1000 * row.median:,.1f} ms{stored}")
    axes.bar_label(bars, labels, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(right=30 * max(1000 * row.median for row in rows))
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title("first token of a repeated prompt, by where its prefix is", fontsize=11)


def _agent(axes: Any, run: Run, model: str) -> None:
    for name, marker in zip(agent.SAMPLINGS, ("o", "x"), strict=True):
        for peer, color in ((agent.CACHE, "tab:blue"), (agent.NO_CACHE, "tab:gray")):
            rows = agent.turns_of(run, peer, f"{agent.FIRST}, {name}")
            places, values = [row.tokens for row in rows], [row.median for row in rows]
            axes.plot(
                places, values, color=color, linestyle=STYLES[model], marker=marker, label=f"{peer}, {name}, {model}"
            )
    axes.set_yscale("log")
    axes.set_xlabel("turn")
    axes.set_title("time to first token of an agent's turns, s", fontsize=11)
