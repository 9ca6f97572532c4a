"""`dsv4 bench expert_memory`: decode speed of a model of Flash's widths with some of its experts in memory."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.process import Process
from benchmarks.harness.residency import drop_files, read_files, resident_bytes
from benchmarks.harness.scenarios import FLASH_WIDTH, TINY
from dsv4.commands.options import count

if TYPE_CHECKING:
    from dsv4.checkpoint.expert_memory import ExpertMemory, ExpertStats

# One hash layer, one CSA and one HCA layer: 10.8 GB, of which 10.3 GB are 768 routed experts.
SHAPE = replace(FLASH_WIDTH, num_hidden_layers=3, num_hash_layers=1, compress_ratios=(0, 4, 128))
QUICK = replace(TINY, num_nextn_predict_layers=0)
COUNT_EVERY = 8  # steps after which resident pages are counted, which takes as long as a step
READ_BYTES = 16 << 20  # per read while the disk is measured
DISK_BYTES = 4 << 30  # read for that, or all there are


@dataclass(frozen=True)
class Figures:
    """One run: seconds of the prompt and of each step, counts of the steps, and the most bytes resident."""

    prefill_s: float
    steps_s: list[float]
    steps: ExpertStats | None
    total: ExpertStats | None
    mapped_bytes: int  # most pages of the experts mapped into the process at the end of a step
    cached_bytes: int  # most pages of the experts in the system's page cache at the end of a step
    digest: int  # of all logits
    disk_bytes: int  # that the process had the disk read during the steps


def run(folder: Path, share: float | None, prompt: int, steps: int) -> Figures:
    """Prefill and decode random tokens. share: of the experts' bytes that may be in memory; None: no limit."""
    import zlib

    import torch

    from dsv4.checkpoint import load_model
    from dsv4.checkpoint.expert_memory import ExpertStats, limit_experts

    model = load_model(folder, check_values=False)
    memory: ExpertMemory | None = None
    if share is not None:
        total = limit_experts(model, 1 << 60).total_bytes
        memory = limit_experts(model, int(total * share))
    else:
        read_files(folder, READ_BYTES)  # into the page cache, where that has room
    ids = torch.randint(0, model.config.vocab_size, (1, prompt + steps), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(1, prompt + steps)
    digest = mapped = cached = 0

    def step(first: int, last: int) -> float:
        nonlocal digest, mapped, cached
        start = time.perf_counter()
        logits = model(ids[:, first:last], cache=cache)
        seconds = time.perf_counter() - start
        digest = zlib.crc32(logits.numpy().tobytes(), digest)
        if memory is not None and (first == 0 or last % COUNT_EVERY == 0):
            in_process, in_system = resident_bytes(memory.rows)
            mapped, cached = max(mapped, in_process), max(cached, in_system)
        return seconds

    with torch.no_grad():
        prefill = step(0, prompt)
        before, read = memory.stats() if memory else None, _disk_bytes()
        seconds = [step(prompt + i, prompt + i + 1) for i in range(steps)]
        read = _disk_bytes() - read
    after = memory.stats() if memory else None
    steps_only = None
    if before is not None and after is not None:
        counts = {name: getattr(after, name) - getattr(before, name) for name in ExpertStats._fields}
        steps_only = ExpertStats(**counts)
    return Figures(prefill, seconds, steps_only, after, mapped, cached, digest, read)


def _disk_bytes() -> int:
    """Bytes that this process has had storage read."""
    rows = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("read_bytes"))


def disk_rate(folder: Path) -> float:
    """Bytes per second of reading files that are not in memory, in order."""
    drop_files(folder)
    start = time.perf_counter()
    return read_files(folder, READ_BYTES, DISK_BYTES) / (time.perf_counter() - start)


def line(name: str, figures: Figures, rate: float) -> str:
    """A row of the table: speed, what was read, and the floor that the disk sets."""
    steps = len(figures.steps_s)
    step = statistics.median(figures.steps_s)
    mean = sum(figures.steps_s) / steps
    words = (
        f"{name:14} prefill {figures.prefill_s:7.2f} s   decode {1 / mean:6.2f} tok/s, median step {step * 1e3:6.0f} ms"
    )
    if figures.steps is None or figures.total is None:
        return words
    claims = figures.steps.hits + figures.steps.misses
    read = figures.steps.bytes_read / steps
    return (
        f"{words}   hits {figures.steps.hits / claims:4.0%} (read ahead {figures.steps.read_ahead_hits / claims:3.0%})"
        f"   read {read / 1e6:5.0f} MB/token (disk: {figures.disk_bytes / steps / 1e6:5.0f}),"
        f" floor {read / rate * 1e3:4.0f} ms   most resident: counted {figures.total.peak_bytes / 1e9:.3f},"
        f" mapped {figures.mapped_bytes / 1e9:.3f}, cached {figures.cached_bytes / 1e9:.3f} GB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench expert_memory", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="MODEL", help="made of random weights, 10.8 GB, if it is not there")
    add("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="of the experts' bytes in memory")
    add("--prompt", type=count, default=64, metavar="N", help="tokens; default: %(default)s")
    add("--steps", type=count, default=64, metavar="N", help="decoded tokens; default: %(default)s")
    add("--threads", type=count, default=2, metavar="N", help="default: %(default)s")
    add("--quick", action="store_true", help="a tiny model: does it run?")
    options = parser.parse_args(argv)
    from benchmarks.harness.random_checkpoint import write_random_checkpoint  # after the help, as it imports torch
    from dsv4.checkpoint.shards import Shards

    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as temporary:
        folder = options.folder or Path(temporary) / "model"
        with Process("dsv4", options.threads) as process:
            process.call(write_random_checkpoint, QUICK if options.quick else SHAPE, folder, 1)
        with Shards(folder) as shards:
            files = {entry.file for entry in shards.tensors.values()}
        rate = disk_rate(folder)
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 1e9:.2f} GB; the disk reads {rate / 1e9:.2f} GB/s in order")
        digests: set[int] = set()
        for share in [None, *options.shares]:
            with Process("dsv4", options.threads) as process:
                figures = process.call(run, folder, share, options.prompt, options.steps)
            digests.add(figures.digest)
            print(line("no limit" if share is None else f"{share:.0%} of experts", figures, rate), flush=True)
        print("the same bits in all" if len(digests) == 1 else "THE BITS DIFFER")
    return len(digests) - 1


if __name__ == "__main__":
    sys.exit(main())
