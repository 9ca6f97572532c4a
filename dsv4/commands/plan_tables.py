"""Plans of training runs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from dsv4.analysis.training_memory import Memory
from dsv4.training.prediction import Comparison, RunPlan


def print_plan(name: str, plan: RunPlan, console: Console | None = None) -> None:
    """Print a plan: its stages, the memory of their fullest ranks by kind, and the whole."""
    console = console or Console()
    setting = plan.setting
    console.print(
        f"[bold]{name}[/bold] on {setting.gpus} x {setting.machine.name}, {setting.precision}, "
        f"{setting.efficiency:.0%} of the product rate"
    )
    console.print(_stages(plan))
    console.print(_memory(plan))
    tokens = sum(stage.shape.tokens for stage in plan.stages)
    console.print(
        f"{tokens:.3g} tokens: {_time(plan.seconds)}, {plan.gpu_hours:,.1f} GPU hours, "
        f"${plan.gpu_hours * plan.price:,.0f} at ${plan.price:g} each",
        highlight=False,
    )
    for stage in plan.stages:
        if not stage.fits:
            have = setting.machine.memory
            console.print(
                f"[red]{stage.shape.name} does not fit[/red]: {_bytes(stage.memory.total)} of {_bytes(have)} per rank",
                highlight=False,
            )


def _stages(plan: RunPlan) -> Table:
    table = _table("Stages", "stage", "steps", "ranks d/e/c/p", "recompute", "s/step", "MFU", "time")
    for stage in plan.stages:
        degrees = stage.degrees
        table.add_row(
            stage.shape.name, f"{stage.shape.steps:,}",
            f"{degrees.data}/{degrees.expert}/{degrees.context}/{degrees.pipeline}", stage.recompute,
            f"{stage.step_seconds:,.3g}", f"{stage.mfu:.1%}", _time(stage.seconds),
        )  # fmt: skip
    table.caption = "ranks: data/expert/context/pipeline"
    return table


def _memory(plan: RunPlan) -> Table:
    table = _table("Memory of the fullest rank", "", *(stage.shape.name for stage in plan.stages))
    for field in fields(Memory):
        table.add_row(field.name, *(_bytes(getattr(stage.memory, field.name)) for stage in plan.stages))
    table.add_section()
    table.add_row("all", *(f"[bold]{_bytes(stage.memory.total)}[/bold]" for stage in plan.stages))
    return table


def print_comparison(found: Sequence[Comparison], console: Console | None = None) -> None:
    """Print what was predicted for a run's stages beside what they took."""
    table = _table(
        "Predicted and measured", "stage", "steps", "tokens/step", "s/step", "measured", "ratio", "peak", "measured",
        "ratio",
    )  # fmt: skip
    for one in found:
        table.add_row(
            one.stage, str(one.steps), f"{one.tokens_per_step:,.0f}", f"{one.predicted_seconds:.3g}",
            f"{one.measured_seconds:.3g}", f"{one.predicted_seconds / one.measured_seconds:.2f}",
            _bytes(one.predicted_bytes), _bytes(one.measured_bytes), f"{one.predicted_bytes / one.measured_bytes:.2f}",
        )  # fmt: skip
    (console or Console()).print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", header_style="dim", no_wrap=True)
    return table


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"


def _time(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:,.1f} h" if seconds < 86400 else f"{seconds / 86400:,.1f} days"
