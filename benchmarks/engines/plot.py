"""Speed and memory against the length of the context, from the rows of a results file."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PANELS = (
    ("prefill", "prefill, tokens a second"),
    ("decode", "decode, tokens a second"),
    ("peak memory", "peak memory, GB"),
)
COLOURS = {"dsv4": "tab:blue", "llama.cpp": "tab:orange", "transformers": "tab:green"}
STYLES = {"slice": "-", "nano": "--"}
TICKS = {256: "0", 2**10: "1K", 2**12: "4K", 2**14: "16K", 2**16: "64K", 2**18: "256K", 2**20: "1M"}
ZERO = 256  # where an empty context stands on an axis of powers of two
LEAST_GB = 0.01  # of the memory axis: below, the formula's line would take the room of all others

Line = dict[int, float]  # tokens -> figure


def lines(file: Path, plan: str) -> tuple[dict[tuple[str, str, str], Line], Line]:
    """({(model, peer, measure): figures}, the KV formula's bytes): newest rows, llama.cpp's best, million as nano."""
    newest: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(text)
        if row.get("benchmark") == "engine" and row["plan"] == plan and row["peer"] != "aim":
            newest[row["model"], row["peer"], row["measure"], row["tokens"]] = row
    found: defaultdict[tuple[str, str, str], Line] = defaultdict(dict)
    formula: Line = {}
    # Where both measured nano the long prompt's figure stays: a line of one run has no steps between two runs.
    for (model, peer, measure, tokens), row in sorted(newest.items(), key=lambda item: item[0][0] == "million"):
        name, contender = "nano" if model == "million" else model, peer.split()[0]
        line, value = found[name, contender, measure], float(row["median"])
        if contender == "llama.cpp" and tokens in line:
            value = (min if measure == "peak memory" else max)(value, line[tokens])
        line[tokens] = value
        if model == "million" and measure == "peak memory":
            formula[tokens] = float(row["floor"])
    return dict(found), formula


def plot_context(file: Path, plan: str, picture: Path) -> bool:
    """Draw `picture`; False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    found, formula = lines(file, plan)
    figure = Figure(figsize=(13.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure, label) in zip(figure.subplots(1, 3), PANELS, strict=True):
        scale = 1e9 if measure == "peak memory" else 1.0
        for (model, peer, what), line in found.items():
            if what == measure and model in STYLES:
                points = [(max(tokens, ZERO), value / scale) for tokens, value in sorted(line.items())]
                style = {"linestyle": STYLES[model], "color": COLOURS[peer], "markersize": 4.5}
                face = COLOURS[peer] if model == "slice" else "white"
                axes.plot(
                    *zip(*points, strict=True), marker="o", markerfacecolor=face, label=f"{peer}, {model}", **style
                )
        if measure == "peak memory" and formula:
            points = [(tokens, value / scale) for tokens, value in sorted(formula.items())]
            axes.plot(*zip(*points, strict=True), "k:", linewidth=1.2, label="KV cache of nano by its formula")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(TICKS), list(TICKS.values()))
        axes.set_xlim(ZERO / 1.4, 2**20 * 1.4)
        if measure == "peak memory":
            axes.set_ylim(bottom=LEAST_GB)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
        axes.set_xlabel("context, tokens")
        axes.set_title(label, fontsize=11)
        axes.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    names = sorted(handles, key=lambda name: ("slice" not in name, "KV" in name))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    return True
