"""`dsv4 bench report`: docs/benchmarks.md and its plots, from the newest full run of each scenario and processor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import serving_plot, serving_report
from benchmarks.harness.plot import plot_contexts
from benchmarks.harness.process import ROOT
from benchmarks.harness.report import lines, table
from benchmarks.harness.results import Run, newest, read
from benchmarks.harness.scenarios import SCENARIOS

HEAD = """# Benchmarks

Written by `dsv4 bench report` from `benchmarks/results/`. Each table is one run of the command beside it, with
contenders in turns. Machines are virtual, with neighbours: ratios within a run say more than figures of two runs. A
figure without ± was measured once. The floor of a figure is the best that the machine allows, by its own ceilings,
which the same run measured. Runs before 29 November 2026 have the former nano, of 18.8M parameters.
"""
SERVING = """## Serving

- `dsv4 bench serving load --llama-server "$(make llama-server | tail -n 1)"`, 25 minutes: three servers under one load.
- `dsv4 bench serving prefix`, 2 minutes: the first token of a repeated prompt of 32,768 tokens.
- `dsv4 bench serving agent`, 5 minutes: an agent's session of 20 turns, with the prefix cache and without.
- `dsv4 bench serving streams`, 12 minutes: 500 streams at a time with slow and vanishing clients. Each answer is
  compared with the one that its request got alone. The cost of HTTP is the processor time of the server's process per
  token beside that of an AsyncEngine alone with the same requests; the wall time of both is given too.

The client is one for all: streamed chat completions over HTTP, prompts of 100 to 8,000 tokens that share no prefix,
answers of one length. Each server has as many slots as there are requests at a time, as many threads as cores, and no
prefix cache under `load`; llama-server also the faster of two weight formats with and without flash attention.
`transformers serve` serves one request after the other: its continuous batching
ends with `ValueError: Invalid layer type: compressed_sparse_attention` (5.23.0), as its paged cache has no such layer.
A server that would need over `--longest` seconds for a load is left out there. `--model slice` takes 120M parameters.
"""
TRAINING = """## Training

- `dsv4 bench train`, 35 minutes: forward and backward at three shapes, a whole step of 16,384 tokens, peak memory and
  the parts of a step, beside transformers with AdamW. `--busy` counts processor time, for a machine that others use.
- `dsv4 bench train nano --corpus CORPUS --before CHECKOUT`, 15 minutes: nano's recipe beside an older checkout's.

Contenders have the same random weights, shapes and tokens, and a process each per shape. dsv4 computes its whole loss,
with those of the routers and the indexers, transformers the next token's.

## Post-training

- `dsv4 bench grpo --trl "$(make trl | tail -n 1)"`, 15 minutes: steps of GRPO on nano beside TRL's GRPOTrainer with
  transformers' generation: rollouts, updates, memory. `--busy` counts processor time.

Contenders have the same prompts, group size, objective and updates, and sample the same number of tokens: no answer
ends early. A step is in memory as one batch per update. TRL's loss for the router is off, which DeepSeek V4's config in
transformers lacks a field for.
"""
OTHERS = """## Other subjects

Each prints its figures; those that were measured stand on the page of their subject, in the README or in the log. The
times are those to expect on two cores.

SUBJECTS
"""
# Command -> (time, what it measures, page of docs/).
SUBJECTS = {
    "speculation": (
        "5 minutes",
        "drafts that stand and speed by number of drafts, on evaluation questions",
        "request.md",
    ),
    "disk_cache": (
        "3 minutes",
        "first token of 32,768 tokens, cold, from memory and from disk after a restart",
        "request.md",
    ),
    "sampling": (
        "half a minute",
        "one draw by vocabulary and filter, a step free and under a JSON schema",
        "kernels.md",
    ),
    "expert_memory": (
        "10 minutes, 11 GB of disk",
        "decode speed and reads with 50, 25 and 10 % of the experts in memory",
        "checkpoints.md",
    ),
    "distill": (
        "an hour",
        "distillation beside the sampled token, one mixed run and averaged weights, at equal tokens",
        "post-training.md",
    ),
    "judge": (
        "an hour",
        "judging before and after training, answers that flatter, and a policy that pleases its judge",
        "post-training.md",
    ),
    "lora": ("10 minutes", "memory and speed of adapters beside training every parameter", "training.md"),
    "ranks": ("5 minutes", "two processes beside one, under torchrun", "parallel.md"),
    "latency": ("2 minutes", "small requests beside a large one: tokenizing, reading, steps", "request.md"),
    "value_check FOLDER": (
        "5 minutes",
        "the check of every weight at load, against reading the files",
        "checkpoints.md",
    ),
}
COMPARED = (("decode", 0), ("decode", 16384), ("prefill", 2048), ("prefill", 8192), ("prefill", 32768))


def document(results: Path) -> str:
    """Markdown document of all processors with results."""
    from benchmarks.harness import grpo_report, train_report  # which import torch

    runs = {file.stem: newest(read(file)) for file in sorted(results.glob("*.jsonl"))}
    runs = {name: found for name, found in runs.items() if found}
    parts = [HEAD, *overview(runs), "", SERVING, TRAINING, others()]
    for slug, found in runs.items():
        hardware = next(iter(found.values())).hardware
        parts += [f"\n## {hardware['cpu']} with {hardware['isa']}, {hardware['cores']} cores\n"]
        if found.keys() & {"slice", "nano", "million"}:
            parts += [f"![Speed and memory against the length](../benchmarks/results/{slug}.png)\n"]
        for run in (found[name] for name in SCENARIOS if name in found):
            parts += section(run, command(run), lines(run))
        served = serving_report.sections(found)
        if served:
            parts += [f"![Serving](../benchmarks/results/{slug}-serving.png)\n"]
        for run in served:
            parts += section(run, serving_report.command(run), serving_report.lines(run))
        for run in (found[name] for name in train_report.SCENARIOS if name in found):
            parts += section(run, train_report.command(run), train_report.lines(run))
        if run := found.get(grpo_report.SCENARIO):
            parts += section(run, grpo_report.command(run), grpo_report.lines(run))
    return "\n".join(parts).rstrip() + "\n"


def section(run: Run, command: str, body: Sequence[str]) -> list[str]:
    """Markdown section of one run: its command, commit and day, then its table and notes."""
    return [f"### {run.scenario}\n", f"{command}, commit {run.commit}, {run.time[:10]}.", *body]


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


def others() -> str:
    """Markdown list of the subjects without results in files."""
    subjects = [
        f"- `dsv4 bench {name}`, {time}: {text} ([{page}]({page}))." for name, (time, text, page) in SUBJECTS.items()
    ]
    return OTHERS.replace("SUBJECTS", "\n".join(subjects))


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
    for picture in (*plot_contexts(options.results), *serving_plot.plot_serving(options.results)):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
