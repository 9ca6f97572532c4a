"""From options to rows: frozen tests first, then each scenario is measured, saved and printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import gate, machine, results
from benchmarks.harness.process import BenchmarkError
from benchmarks.harness.results import Run

if TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[str], object]  # shows a status line
Measure = Callable[[Show], Run]


def record(
    measures: Mapping[str, Measure],
    lines: Callable[[Run], Sequence[str]],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Run the gate, then measure each scenario, append it to results/<hardware>.jsonl and print it."""
    code, sources, hardware = results.commit(), results.package_digest(), machine.hardware()
    if not options.no_gate:
        console.print("Frozen tests first: no number without them.")
        gate.run_tests()
    file: Path = options.results / f"{machine.hardware_slug(hardware)}.jsonl"
    for name, measure in measures.items():
        with console.status(name) as status:
            found = measure(lambda text, status=status: status.update(text))
        if results.package_digest() != sources:
            raise BenchmarkError("dsv4/ changed during the run, so its figures belong to no version of it: no rows")
        found.quick, found.gated, found.commit, found.hardware = options.quick, not options.no_gate, code, hardware
        results.append(file, found)
        console.print(f"\n{name}\n" + "\n".join(lines(found)), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores; commit {code}; rows in {file}")
    console.print("`dsv4 bench report` writes docs/benchmarks.md from them.")
