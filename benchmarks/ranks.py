"""Tokens per second of training on gloo ranks against replicas that share memory, in turns.

    python benchmarks/ranks.py --rounds 3 --steps 6
    python benchmarks/ranks.py model.hidden_size=512 model.n_routed_experts=32

Every run is a process tree of its own: two replicas, two ranks with sharded weights, two ranks with halved experts. Of
each the median over its steps, without the first two, in wall time; then the median over the rounds. `load` is the
machine's load average: on a shared machine the turns, not the figures, are comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = {"replicas": "run.replicas=2", "data": "parallel.data=2", "expert": "parallel.expert=2"}
UNCOUNTED = 2  # first steps


def run_once(kind: str, words: list[str], steps: int, folder: Path) -> tuple[float, float]:
    """(tokens per second, processor seconds of all processes) of a run."""
    launcher = [] if kind == "replicas" else ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [sys.executable, "-m", *launcher, "dsv4", "train", "pretrain", f"stages.0.steps={steps}"]
    before = os.times()
    subprocess.run(
        [*command, *words, "data.text=docs", KINDS[kind], "--run-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[UNCOUNTED:]
    return statistics.median(json.loads(line)["tokens_per_second"] for line in lines), busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                found[kind].append(run_once(kind, options.words, options.steps, Path(folder) / "run"))
            rate, busy = found[kind][-1]
            print(f"round {number} {kind:9} {rate:8.1f} tok/s  {busy:7.1f} processor s  load {os.getloadavg()[0]:.1f}")
    for kind, results in found.items():
        rate, busy = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"median  {kind:9} {rate:8.1f} tok/s  {busy:7.1f} processor s")


if __name__ == "__main__":
    main()
