"""Printing of `dsv4 plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import zip_longest

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4.analysis.training_memory import Memory
from dsv4.analysis.training_plan import MOST_DOUBLINGS, StagePlan
from dsv4.commands.terminal.wide_table import figures_table, print_whole
from dsv4.training.parts_plan import PartsPlan
from dsv4.training.prediction import Comparison, RunPlan

DIMENSIONS_IN_ORDER = "ranks: data/expert/context/pipeline"
NONE = "-"  # of a stage that does not fit, which takes no time


def print_plan(name: str, plan: RunPlan, console: Console | None = None) -> None:
    """Print a plan: what does not fit, the stages, the memory of their fullest ranks by kind, and the whole."""
    console = console or Console(highlight=False)
    setting = plan.setting
    _print(
        console,
        f"[bold]{escape(name)}[/bold] on {setting.gpus:,} x {setting.machine.name}, {setting.precision}, "
        f"{setting.efficiency:.0%} of the product rate",
    )
    _print_unfit("", plan, console)
    _print_table("Stages", _stages(plan), console)
    _print_table("Memory of the fullest rank", _memory(plan), console)
    _print(console, _total([plan], plan))
    _print_rounded(plan.stages, console)


def print_parts(name: str, plan: PartsPlan) -> None:
    """Print the plans of a recipe's parts as one table, with the memory of each stage's fullest rank."""
    console = Console(highlight=False)
    settings = [part.setting for part in plan.parts.values()]
    kinds = dict.fromkeys(f"{one.gpus:,} x {one.machine.name}, {one.precision}" for one in settings)
    _print(console, f"[bold]{escape(name)}[/bold] on {'; '.join(kinds)}")
    for part, own in plan.parts.items():
        _print_unfit(f"{part} ", own, console)
    table = figures_table("stage", "tokens", "ranks d/e/c/p", "recompute", "s/step", "memory", "time")
    for part, own in plan.parts.items():
        for stage in own.stages:
            memory, fits = _bytes(stage.memory.total), stage.fits
            table.add_row(
                f"{part} {stage.shape.name}", _tokens(stage.shape.tokens), _ranks(stage), stage.recompute,
                _figure(stage.step_seconds) if fits else NONE, memory if fits else f"[red]{memory}[/red]",
                _time(stage.seconds) if fits else NONE,
            )  # fmt: skip
        table.add_row(f"[bold]{part}[/bold]", *[""] * 5, f"[bold]{_time(own.seconds) if own.fits else NONE}[/bold]")
        table.add_section()
    fits = all(own.fits for own in plan.parts.values())
    table.add_row("[bold]all[/bold]", *[""] * 5, f"[bold]{_time(plan.seconds) if fits else NONE}[/bold]")
    table.caption = DIMENSIONS_IN_ORDER
    _print_table("Parts", table, console)
    _print(console, _total(plan.parts.values(), plan))
    if fits:
        times = _figure(plan.budget / plan.seconds)
        _print(
            console,
            f"{_hours(plan.seconds)} in all; the recipe's budget of {_hours(plan.budget)} is {times} times that",
        )


def _print_unfit(part: str, plan: RunPlan, console: Console) -> None:
    """Name the stages that do not fit in memory, and where they do."""
    have = plan.setting.machine.memory
    for stage, larger in zip_longest(plan.stages, plan.larger):
        if not stage.fits:
            _print(
                console,
                f"[red]{part}{escape(stage.shape.name)} does not fit[/red]: {_bytes(stage.memory.total)} of "
                f"{_bytes(have)} per rank{_elsewhere(plan, larger)}",
            )


def _print_rounded(stages: Sequence[StagePlan], console: Console) -> None:
    """Name the stages whose steps have other rows than the recipe's, which the run has to be told."""
    for stage in stages:
        batch = stage.shape.batch_tokens
        if batch != stage.asked_rows * stage.shape.row_tokens:
            _print(
                console,
                f"{escape(stage.shape.name)}: batch_tokens={batch} in place of {stage.asked_rows:,} rows, so that "
                f"{stage.degrees.batches:,} ranks have {stage.micro_batches:,} each",
            )


def _total(plans: Iterable[RunPlan], whole: RunPlan | PartsPlan) -> str:
    """Tokens, time and cost of all stages; of stages that do not all fit, why there is neither."""
    stages = [stage for plan in plans for stage in plan.stages]
    tokens = f"{_tokens(sum(stage.shape.tokens for stage in stages))} tokens"
    unfit = sum(not stage.fits for stage in stages)
    if unfit:
        do = "does" if unfit == 1 else "do"
        return f"{tokens}: no time and no cost, since {unfit} of {len(stages)} stages {do} not fit"
    hours = whole.gpu_hours
    price = whole.cost / hours if hours else 0.0
    return f"{tokens}: {_time(whole.seconds)}, {hours:,.1f} GPU hours, ${whole.cost:,.0f} at ${price:g} each"


def _elsewhere(plan: RunPlan, larger: StagePlan | None) -> str:
    if larger is not None:
        return f"; it fits on {larger.degrees.ranks:,} ({_ranks(larger)})"
    return f"; nor on {plan.setting.gpus << MOST_DOUBLINGS:,} with these settings" if plan.larger else ""


def _ranks(plan: StagePlan) -> str:
    degrees = plan.degrees
    return f"{degrees.data}/{degrees.expert}/{degrees.context}/{degrees.pipeline}"


def _stages(plan: RunPlan) -> Table:
    table = figures_table("stage", "steps", "ranks d/e/c/p", "recompute", "s/step", "MFU", "time")
    for stage in plan.stages:
        taken = [_figure(stage.step_seconds), f"{stage.mfu:.1%}", _time(stage.seconds)]
        table.add_row(
            escape(stage.shape.name), f"{stage.shape.steps:,}", _ranks(stage), stage.recompute,
            *(taken if stage.fits else [NONE] * len(taken)),
        )  # fmt: skip
    table.caption = DIMENSIONS_IN_ORDER
    return table


def _memory(plan: RunPlan) -> Table:
    table = figures_table("", *(escape(stage.shape.name) for stage in plan.stages))
    for field in fields(Memory):
        table.add_row(field.name, *(_bytes(getattr(stage.memory, field.name)) for stage in plan.stages))
    table.add_section()
    table.add_row("all", *(f"[bold]{_bytes(stage.memory.total)}[/bold]" for stage in plan.stages))
    return table


def print_comparison(found: Sequence[Comparison]) -> None:
    """Print what was predicted for a run's stages beside what they took."""
    table = figures_table("stage", "steps", "tokens/step", "s/step", "measured", "ratio", "peak", "measured", "ratio")
    for one in found:
        table.add_row(
            escape(one.stage), f"{one.steps:,}", f"{one.tokens_per_step:,.0f}", _figure(one.predicted_seconds),
            _figure(one.measured_seconds), f"{one.predicted_seconds / one.measured_seconds:.2f}",
            _bytes(one.predicted_bytes), _bytes(one.measured_bytes), f"{one.predicted_bytes / one.measured_bytes:.2f}",
        )  # fmt: skip
    _print_table("Predicted and measured", table, Console(highlight=False))


def _print(console: Console, line: str) -> None:
    """Print a line whole, whatever the console's width."""
    console.print(line, highlight=False, soft_wrap=True)


def _print_table(title: str, table: Table, console: Console) -> None:
    _print(console, f"[bold cyan]{title}[/bold cyan]")
    print_whole(table, console)


def _figure(number: float) -> str:
    """Three digits, whole from 100 on: "0.0906", "2,030"."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}" if number >= 1e-4 else f"{number:.6f}"


def _tokens(number: int) -> str:
    """In thousands, millions and so on, from a million on: "409,600", "8.0M", "32.0T"."""
    for sign, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= unit:
            return f"{number / unit:,.1f}{sign}"
    return f"{number:,}"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.2f} GB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.{1 if seconds >= 360 else 3}f} hours"


def _time(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{seconds / 3600:,.1f} h" if seconds < 86400 else f"{seconds / 86400:,.1f} days"
