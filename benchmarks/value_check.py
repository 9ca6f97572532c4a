"""`dsv4 bench value_check`: what it costs at load to look at every weight, beside reading the same files."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.scenarios import FLASH_WIDTH
from dsv4.analysis.inventory import LAYOUTS, StorageLayout, tensor_inventory
from dsv4.checkpoint import load_model
from dsv4.checkpoint.atomic import new_folder
from dsv4.checkpoint.files import TORCH_DTYPES, ShardWriter, write_json
from dsv4.checkpoint.folder import Checkpoint
from dsv4.checkpoint.shards import SINGLE_NAME
from dsv4.checkpoint.values import check_values
from dsv4.kernels import backends

BUFFER_BYTES = 1 << 20


def main() -> None:
    options = _parser().parse_args()
    folder: Path = options.folder
    if options.random and not folder.exists():
        write_random(folder, options.random)
    backends.native_module()
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    read(files)  # into the page cache, so that what follows is not the disk's speed
    with Checkpoint(folder) as checkpoint:
        names = [spec.name for spec in tensor_inventory(checkpoint.config, "fp32")]
        checkpoint.map_files()
        reading = fastest(options.rounds, lambda: read(files))
        looking = fastest(options.rounds, lambda: [check_values(checkpoint, name) for name in names])
    print(f"{size / 1e9:.3f} GB, {len(names)} weights: reading {reading:.3f} s, the look {looking:.3f} s")
    load_model(folder)
    before = own_bytes()
    started = time.perf_counter()
    model = load_model(folder)  # held while its memory is counted
    seconds = time.perf_counter() - started
    taken = (own_bytes() - before) / 1e9
    unchecked = fastest(options.rounds, lambda: load_model(folder, check_values=False))
    print(f"load {seconds:.2f} s, {unchecked:.2f} s unchecked; {taken:.2f} GB beside the files ({model.dtype})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument("--random", choices=LAYOUTS, help="make MODEL of random weights, some GB, if it is not there")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of which the fastest counts (default: 3)")
    return parser


def fastest(rounds: int, work: Callable[[], object]) -> float:
    """Seconds."""
    seconds: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def read(files: list[Path]) -> None:
    buffer = bytearray(BUFFER_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def own_bytes() -> int:
    """Memory of this process that is no file's (Linux)."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.M)
    return int(found[1]) * 1024 if found else 0


def write_random(folder: Path, layout: StorageLayout) -> None:
    """Two layers of Flash's widths with 24 experts each."""
    expert_dtype = "fp8" if layout == "official-base" else "fp4"
    config = replace(FLASH_WIDTH, n_routed_experts=24, vocab_size=16384, expert_dtype=expert_dtype)
    specs = list(tensor_inventory(config, layout))
    generator = torch.Generator().manual_seed(1)
    with new_folder(folder, overwrite=False) as temporary:
        with ShardWriter(temporary / SINGLE_NAME, specs) as shard:
            for spec in specs:
                values = torch.randn(spec.shape, generator=generator)
                if spec.component == "scale":
                    values.fill_(2.0**-10)
                if spec.dtype == "I64":
                    values = torch.randint(config.n_routed_experts, spec.shape, generator=generator)
                shard.write(spec.name, values.to(TORCH_DTYPES[spec.dtype]))
        write_json(temporary / "config.json", config.to_dict(quantized=layout in ("official", "official-base")))


if __name__ == "__main__":
    main()
