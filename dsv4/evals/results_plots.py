"""Plots of the results page, each an SVG element as text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv4.evals.post_training_results import STUDENT_SHARE, Count, Results
from dsv4.training.plots import smooth

Rows = Sequence[Mapping[str, Any]]
COLORS = ("#2563a8", "#c2571a", "#2e7d4f", "#8a4fa3", "#7a6a12", "#54606e")
WIDTH, HEIGHT = 7.2, 3.4  # inches


def reward_curves(runs: Mapping[str, Rows]) -> str:
    """Mean reward of every GRPO step by specialist: the steps faintly, a running mean on top."""
    return _draw(lambda axes: _curves(axes, runs, "reward", "mean reward of a step"))


def kl_curves(student: Rows) -> str:
    """Reverse KL per token to each teacher over the steps of distillation."""
    names = sorted({name for row in student for name in row["kl_by_teacher"]})
    runs = {
        name: [
            {"step": row["step"], "kl": row["kl_by_teacher"][name]} for row in student if name in row["kl_by_teacher"]
        ]
        for name in names
    }
    return _draw(lambda axes: _curves(axes, runs, "kl", "KL to the teacher, nats per token"))


def answer_tokens(runs: Mapping[str, Rows]) -> str:
    """Mean tokens of an answer over the steps of GRPO."""
    return _draw(lambda axes: _curves(axes, runs, "answer_tokens", "tokens of an answer"))


def domain_bars(results: Results) -> str:
    """Rates by domain of every model, of the specialists the domain's own, with 95 % intervals."""
    scores = results.scores
    shown: dict[str, list[Count]] = {
        "base": [scores.base[d] for d in results.domains],
        "sft": [scores.sft[d] for d in results.domains],
        "specialist": [scores.specialists[d][d] for d in results.domains],
        "student": [scores.student[d] for d in results.domains],
        "averaged": [scores.averaged[d] for d in results.domains],
        "mixed": [scores.mixed[d] for d in results.domains],
    }

    def draw(axes: Any) -> None:
        width = 0.8 / len(shown)
        for place, (name, counts) in enumerate(shown.items()):
            left = [number + (place - (len(shown) - 1) / 2) * width for number in range(len(counts))]
            rates = [100 * count.rate for count in counts]
            below = [rate - 100 * count.interval[0] for rate, count in zip(rates, counts, strict=True)]
            above = [100 * count.interval[1] - rate for rate, count in zip(rates, counts, strict=True)]
            axes.bar(left, rates, width * 0.9, color=COLORS[place], label=name)
            axes.errorbar(left, rates, [below, above], fmt="none", ecolor="#222", elinewidth=0.8, capsize=1.5)
        axes.set_xticks(range(len(results.domains)), results.domains)
        axes.set_ylabel("right, %")
        axes.set_ylim(0, 105)
        axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.16), columnspacing=1, handlelength=1)

    return _draw(draw)


def student_bars(results: Results) -> str:
    """The student's rate in its teacher's, by domain and of the means, with the line that it should reach."""
    scores = results.scores
    pairs = {d: (scores.student[d].rate, scores.specialists[d][d].rate) for d in results.domains}
    shares = {name: own / teacher for name, (own, teacher) in pairs.items() if teacher}
    if results.student_share is not None:
        shares["mean"] = results.student_share

    def draw(axes: Any) -> None:
        names, values = list(shares), [100 * share for share in shares.values()]
        bars = axes.bar(names, values, 0.45, color=[COLORS[5] if name == "mean" else COLORS[0] for name in names])
        axes.bar_label(bars, fmt="%.0f %%", padding=2)
        axes.axhline(100 * STUDENT_SHARE, color=COLORS[1], linestyle="--", linewidth=1.2)
        axes.text(
            1.0, 100 * STUDENT_SHARE, f" {100 * STUDENT_SHARE:.0f} %", color=COLORS[1], va="center",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(0, max([115.0, *(1.12 * value for value in values)]))
        axes.set_ylabel("of the teacher's rate, %")

    return _draw(draw)


def effort_curve(results: Results) -> str:
    """Share of right answers over mean tokens of an answer, a point for each level."""

    def draw(axes: Any) -> None:
        free = {name: effort.free for name, effort in results.efforts.items() if effort.free is not None}
        for color, label, levels in ((COLORS[0], "in its window", results.efforts), (COLORS[1], "free", free)):
            if not levels:
                continue
            points = [(effort.tokens, 100 * effort.accuracy) for effort in levels.values()]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
            for name, point in zip(levels, points, strict=True):
                axes.annotate(name, point, xytext=(6, 6), textcoords="offset points", color=color)
        axes.legend(loc="lower right")
        axes.set_ylim(0, 105)
        axes.margins(x=0.15)
        axes.set_xlabel("mean tokens of an answer")
        axes.set_ylabel("right, %")

    return _draw(draw)


def _curves(axes: Any, runs: Mapping[str, Rows], key: str, label: str) -> None:
    for place, (name, rows) in enumerate(runs.items()):
        steps, values = [row["step"] for row in rows], [float(row[key]) for row in rows]
        color = COLORS[place % len(COLORS)]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, 0.1), color=color, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))  # rewards with penalties are below 0
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))


def _draw(draw: Callable[[Any], None]) -> str:
    """SVG element of one plot; the same figures give the same text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "dsv4", "font.size": 9, "font.family": "sans-serif"}
    with rc_context({**settings, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    found = text.getvalue()
    svg = found[found.index("<svg") :]
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
