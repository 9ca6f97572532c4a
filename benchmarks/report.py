"""`dsv4 bench report`: docs/benchmarks.md and its plots, from the newest full run of each scenario and processor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.plot import plot_contexts
from benchmarks.harness.process import ROOT
from benchmarks.harness.report import lines, table
from benchmarks.harness.results import Run, newest, read
from benchmarks.harness.scenarios import SCENARIOS

HEAD = """# Benchmarks

Written by `dsv4 bench report` from `benchmarks/results/`. Each table is one run of the command beside it, with
contenders in turns. Machines are virtual, with neighbours: ratios within a run say more than figures of two runs. A
figure without ± was measured once. The floor of a figure is the best that the machine allows, by its own ceilings,
which the same run measured.
"""
COMPARED = (("decode", 0), ("decode", 16384), ("prefill", 2048), ("prefill", 8192), ("prefill", 32768))


def document(results: Path) -> str:
    """Markdown document of all processors with results."""
    runs = {file.stem: newest(read(file)) for file in sorted(results.glob("*.jsonl"))}
    runs = {name: found for name, found in runs.items() if found}
    parts = [HEAD, *overview(runs)]
    for slug, found in runs.items():
        hardware = next(iter(found.values())).hardware
        parts += [f"\n## {hardware['cpu']} with {hardware['isa']}, {hardware['cores']} cores\n"]
        if found.keys() & {"slice", "nano", "million"}:
            parts += [f"![Speed and memory against the length](../benchmarks/results/{slug}.png)\n"]
        for name in SCENARIOS:
            if name in found:
                run = found[name]
                parts += [f"### {name}\n", f"{command(run)}, commit {run.commit}, {run.time[:10]}.", *lines(run)]
    return "\n".join(parts).rstrip() + "\n"


def overview(runs: dict[str, dict[str, Run]]) -> list[str]:
    """Markdown table of dsv4's speed relative to llama.cpp's, per processor."""
    rows: list[list[str]] = []
    compared = {name: found["slice"] for name, found in runs.items() if "slice" in found}
    for measure, tokens in COMPARED:
        ratios = [run.ratio("llama.cpp", measure, tokens) for run in compared.values()]
        rows.append([f"{measure}, {tokens:,}", *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    if not compared:
        return []
    names = [f"{run.hardware['cpu']}, {run.hardware['isa']}" for run in compared.values()]
    return ["Speed as a multiple of llama.cpp's, model `slice`:\n", *table(["", *names], rows)]


def command(run: Run) -> str:
    llama = ' --llama-bench "$(make llama-bench | tail -n 1)"' if "llama.cpp" in run.settings else ""
    return f"`dsv4 bench engine --models {run.scenario}{llama}`"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench report", description="Write docs/benchmarks.md from the results.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="default: %(default)s")
    options = parser.parse_args(argv)
    options.out.write_text(document(options.results), encoding="utf-8")
    print(options.out)
    for picture in plot_contexts(options.results):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
