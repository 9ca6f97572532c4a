"""Plans of training runs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest

from rich.console import Console
from rich.table import Table

from dsv4.analysis.training_memory import Memory
from dsv4.analysis.training_plan import MOST_DOUBLINGS, StagePlan
from dsv4.training.parts_plan import PartsPlan
from dsv4.training.prediction import Comparison, RunPlan

DIMENSIONS_IN_ORDER = "ranks: data/expert/context/pipeline"


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
    console.print(_total(plan.stages, plan), highlight=False)
    _print_rounded(plan.stages, console)
    for stage, larger in zip_longest(plan.stages, plan.larger):
        if not stage.fits:
            have = setting.machine.memory
            console.print(
                f"[red]{stage.shape.name} does not fit[/red]: {_bytes(stage.memory.total)} of {_bytes(have)} per rank"
                f"{_elsewhere(plan, larger)}",
                highlight=False,
                soft_wrap=True,
            )


def print_parts(name: str, plan: PartsPlan, console: Console | None = None) -> None:
    """Print the plans of a recipe's parts as one table, with the memory of each stage's fullest rank."""
    console = console or Console()
    settings = [part.setting for part in plan.parts.values()]
    kinds = dict.fromkeys(f"{one.gpus} x {one.machine.name}, {one.precision}" for one in settings)
    console.print(f"[bold]{name}[/bold] on {'; '.join(kinds)}")
    table = _table("Parts", "stage", "tokens", "ranks d/e/c/p", "recompute", "s/step", "memory", "time")
    for part, own in plan.parts.items():
        for stage in own.stages:
            memory = _bytes(stage.memory.total)
            table.add_row(
                f"{part} {stage.shape.name}", f"{stage.shape.tokens / 1e6:,.1f}M", _ranks(stage), stage.recompute,
                f"{stage.step_seconds:,.3g}", memory if stage.fits else f"[red]{memory}[/red]", _time(stage.seconds),
            )  # fmt: skip
        table.add_row(f"[bold]{part}[/bold]", *[""] * 5, f"[bold]{_time(own.seconds)}[/bold]")
        table.add_section()
    table.add_row("[bold]all[/bold]", *[""] * 5, f"[bold]{_time(plan.seconds)}[/bold]")
    table.caption = DIMENSIONS_IN_ORDER
    console.print(table)
    console.print(_total([stage for own in plan.parts.values() for stage in own.stages], plan), highlight=False)
    share = plan.budget / plan.seconds
    hours = f"{_hours(plan.seconds)} in all; the recipe's budget of {_hours(plan.budget)} is {share:.2g} of that"
    console.print(hours, highlight=False, soft_wrap=True)


def _print_rounded(stages: Sequence[StagePlan], console: Console) -> None:
    """Name the stages whose steps have other rows than the recipe's, which the run has to be told."""
    for stage in stages:
        batch = stage.shape.batch_tokens
        if batch != stage.asked_rows * stage.shape.row_tokens:
            console.print(
                f"{stage.shape.name}: batch_tokens={batch} in place of {stage.asked_rows} rows, so that "
                f"{stage.degrees.batches} ranks have {stage.micro_batches} each",
                highlight=False,
                soft_wrap=True,
            )


def _total(stages: Sequence[StagePlan], plan: RunPlan | PartsPlan) -> str:
    tokens = sum(stage.shape.tokens for stage in stages)
    hours = plan.gpu_hours
    price = plan.cost / hours if hours else 0.0
    return f"{tokens:.3g} tokens: {_time(plan.seconds)}, {hours:,.1f} GPU hours, ${plan.cost:,.0f} at ${price:g} each"


def _elsewhere(plan: RunPlan, larger: StagePlan | None) -> str:
    if larger is not None:
        return f"; it fits on {larger.degrees.ranks:,} ({_ranks(larger)})"
    return f"; nor on {plan.setting.gpus << MOST_DOUBLINGS:,} with these settings" if plan.larger else ""


def _ranks(plan: StagePlan) -> str:
    degrees = plan.degrees
    return f"{degrees.data}/{degrees.expert}/{degrees.context}/{degrees.pipeline}"


def _stages(plan: RunPlan) -> Table:
    table = _table("Stages", "stage", "steps", "ranks d/e/c/p", "recompute", "s/step", "MFU", "time")
    for stage in plan.stages:
        table.add_row(
            stage.shape.name, f"{stage.shape.steps:,}", _ranks(stage), stage.recompute, f"{stage.step_seconds:,.3g}",
            f"{stage.mfu:.1%}", _time(stage.seconds),
        )  # fmt: skip
    table.caption = DIMENSIONS_IN_ORDER
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


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.{1 if seconds >= 360 else 3}f} hours"


def _time(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:,.1f} h" if seconds < 86400 else f"{seconds / 86400:,.1f} days"
