"""`dsv4 bench value_check`: cost of checking every weight at load, compared with reading the same files."""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.harness.process import own_bytes
from benchmarks.harness.residency import read_files
from benchmarks.harness.scenarios import FLASH_WIDTH
from benchmarks.harness.turns import in_turns, line
from dsv4.analysis.inventory import LAYOUTS, tensor_inventory
from dsv4.commands.options import count

SHAPE = replace(FLASH_WIDTH, n_routed_experts=24, vocab_size=16384)
READ_BYTES = 1 << 20  # per read


def seconds(work: Callable[[], object], _: int) -> float:
    return timeit.timeit(work, number=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dsv4 bench value_check", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument("--random", choices=LAYOUTS, help="make MODEL of random weights, some GB, if it is not there")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="default: %(default)s")
    options = parser.parse_args(argv)
    from benchmarks.harness.random_checkpoint import write_random_checkpoint  # after the help, as it imports torch
    from dsv4.checkpoint import load_model
    from dsv4.checkpoint.folder import Checkpoint
    from dsv4.checkpoint.values import check_values
    from dsv4.kernels import backends

    if options.random and not options.folder.exists():
        experts = "fp8" if options.random == "official-base" else "fp4"
        write_random_checkpoint(replace(SHAPE, expert_dtype=experts), options.folder, 1, options.random)
    backends.native_module()
    size = read_files(options.folder, READ_BYTES)  # into the page cache, so that the disk's speed does not matter
    load_model(options.folder)
    before = own_bytes()
    model = load_model(options.folder)  # held while its memory is counted
    taken = (own_bytes() - before) / 1e9
    with Checkpoint(options.folder) as checkpoint:
        names = [spec.name for spec in tensor_inventory(checkpoint.config, "fp32")]
        checkpoint.map_files()
        work: dict[str, Callable[[], object]] = {
            "reading": partial(read_files, options.folder, READ_BYTES),
            "check": lambda: [check_values(checkpoint, name) for name in names],
            "load": partial(load_model, options.folder),
            "load unchecked": partial(load_model, options.folder, check_values=False),
        }
        samples = in_turns({name: partial(seconds, run) for name, run in work.items()}, options.rounds)
    print(f"{size / 1e9:.3f} GB, {len(names)} weights; {taken:.2f} GB beside the files ({model.dtype})")
    for name, values in samples.items():
        print(line(name, values, "s"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
