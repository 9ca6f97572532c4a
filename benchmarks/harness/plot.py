"""Plots of speed and memory against context length, one picture per processor."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Run, newest, read
from dsv4.training.plots import new_figure

PANELS = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "peak memory": "peak memory, GB"}
FORMULA = "KV formula"
COLOURS = {"dsv4": "tab:blue", "llama.cpp": "tab:orange", "transformers": "tab:green", FORMULA: "black"}
STYLES = {"slice": "-", "nano": "--"}
TICKS = {256: "0", 2**10: "1K", 2**12: "4K", 2**14: "16K", 2**16: "64K", 2**18: "256K", 2**20: "1M"}
ZERO = 256  # position of an empty context on the log axis

Line = dict[int, float]  # tokens -> figure


def curves(runs: dict[str, Run]) -> dict[tuple[str, str, str], Line]:
    """Lines by (model, contender, measure): llama.cpp's best setting, `million` as part of nano, and the KV formula."""
    found: defaultdict[tuple[str, str, str], Line] = defaultdict(dict)
    for name in ("slice", "nano", "million"):  # `million` last, so that its values win: no jumps between two runs
        for row in runs[name].rows if name in runs else ():
            model, peer = "nano" if name == "million" else name, row.peer.split()[0]
            best = runs[name].find(peer, row.measure, row.tokens)
            if best is not None:
                found[model, peer, row.measure][row.tokens] = best.median
            if name == "million" and row.measure == "peak memory":
                found["nano", FORMULA, row.measure][row.tokens] = row.floor
    return dict(found)


def plot_contexts(results: Path) -> list[Path]:
    """Draw results/<hardware>.png for each processor; nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    drawn: list[Path] = []
    for file in sorted(results.glob("*.jsonl")):
        found = curves(newest(read(file)))
        if found:
            drawn.append(file.with_suffix(".png"))
            draw(found, drawn[-1])
    return drawn


def draw(found: dict[tuple[str, str, str], Line], picture: Path) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = new_figure(13.0, 4.8)
    handles: dict[str, Any] = {}
    for axes, (measure, label) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        scale = 1e9 if measure == "peak memory" else 1.0
        for (model, peer, what), line in found.items():
            if what == measure:
                points = [(max(tokens, ZERO), value / scale) for tokens, value in sorted(line.items())]
                formula, color = peer == FORMULA, COLOURS[peer]
                name = "KV cache of nano by its formula" if formula else f"{peer}, {model}"
                (handles[name],) = axes.plot(
                    *zip(*points, strict=True),
                    color=color,
                    linestyle=":" if formula else STYLES[model],
                    marker=None if formula else "o",
                    markersize=4.5,
                    markerfacecolor=color if model == "slice" else "white",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(TICKS), list(TICKS.values()))
        axes.set_xlim(ZERO / 1.4, 2**20 * 1.4)
        if measure == "peak memory":
            axes.set_ylim(bottom=0.01)  # the formula's line goes far below and would squeeze the others
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
        axes.set_xlabel("context, tokens")
        axes.set_title(label, fontsize=11)
        axes.grid(alpha=0.3)
    names = sorted(handles, key=lambda name: ("slice" not in name, "KV" in name))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4)
    figure.savefig(picture, dpi=130)
