"""Picture of a run: losses, rewards, learning rate and speed over the tokens seen, from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]

LOSSES = {"loss": "next token", "mtp_loss": "MTP", "indexer_loss": "indexer"}
FIGURES = {
    "reward": "mean reward",
    "kl": "KL per token",
    "answer_tokens": "tokens of an answer",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}
SMOOTHED_STEPS = 1 / 50  # of the run: the window of the running mean


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Steps in a run's metrics.jsonl, without a last line that is cut. ValueError if there is none.

    Of a step that was run again after a rollback, the last attempt.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = list({record["step"]: record for record in records if "event" not in record}.values())
    if not rows:
        raise ValueError(f"{path} has no step of a run")
    return rows


def draw_run(run_dir: Path, picture: Path | None = None) -> Path | None:
    """Draw a run to `picture`, by default losses.png in its folder; None without matplotlib."""
    rows = read_metrics(run_dir)
    if find_spec("matplotlib") is None:
        return None
    picture = picture or run_dir / "losses.png"
    shown = [key for key in FIGURES if any(key in row for row in rows)]
    figure = new_figure(4.3 * (1 + len(shown)), 4.2)
    panels = figure.subplots(1, 1 + len(shown))
    _draw_losses(panels[0], rows)
    for axes, key in zip(panels[1:], shown, strict=True):
        axes.plot(*_points(rows, key), color="tab:blue")
        axes.set_title(FIGURES[key], fontsize=11)
    for axes in panels:
        if all(min(line.get_ydata()) >= 0 for line in axes.lines):  # rewards with penalties are below
            axes.set_ylim(bottom=0)
        for row in _stage_starts(rows)[1:]:
            axes.axvline(row["tokens"], color="gray", linestyle=":", linewidth=1)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    figure.suptitle(" | ".join(row["stage"] for row in _stage_starts(rows)), fontsize=10)
    figure.savefig(picture, dpi=130)
    return picture


def new_figure(width: float, height: float) -> Any:
    """Figure of a size in inches, drawn without a display; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_losses(axes: Any, rows: Rows) -> None:
    """Losses that were measured and are not zero throughout: every step faintly, and a running mean."""
    for number, (key, label) in enumerate(LOSSES.items()):
        tokens, values = _points(rows, key)
        if any(values):
            axes.plot(tokens, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
            axes.plot(tokens, smooth(values), color=f"C{number}", label=label)
    axes.set_title("loss", fontsize=11)
    if axes.lines:
        axes.legend()


def _points(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the steps that measured a figure."""
    measured = [row for row in rows if key in row]
    return [row["tokens"] for row in measured], [row[key] for row in measured]


def smooth(values: Sequence[float], share: float = SMOOTHED_STEPS) -> list[float]:
    """Mean of each value and those before it in a window of a `share` of all."""
    width = max(1, round(len(values) * share))
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _stage_starts(rows: Rows) -> list[dict[str, Any]]:
    """First step of each stage."""
    stages = [None, *(row["stage"] for row in rows)]
    return [row for before, row in zip(stages, rows, strict=False) if row["stage"] != before]
