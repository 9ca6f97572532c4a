"""What the machine can do, measured beside the models: memory bandwidth and matrix products, with the same threads."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

EMULATED_SIZE = 256


def _best(run: Callable[[], object], repeats: int) -> float:
    """Shortest time of some repeats, seconds: a ceiling is what the machine can do, not what it did on average."""
    times: list[float] = []
    for _ in range(repeats + 1):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times[1:])


def _bandwidth(megabytes: int, repeats: int) -> dict[str, float]:
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / _best(lambda: target.copy_(source), repeats),
        "read_bytes_per_s": source.nbytes / _best(source.sum, repeats),
    }


def measure_ceilings(megabytes: int, size: int, repeats: int = 3) -> dict[str, float]:
    """Bytes a second (copy counts reads and writes) and FLOP a second of a size^3 product, 2 a multiply-add."""
    found = _bandwidth(megabytes, repeats)
    # Without bf16 instructions torch emulates them, ten times slower than fp32 or worse: a small product has to do.
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    for dtype, name, side in (
        (torch.float32, "fp32", size),
        (torch.bfloat16, "bf16", size if native else min(size, EMULATED_SIZE)),
    ):
        a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
        found[f"{name}_flop_per_s"] = 2 * side**3 / _best(lambda a=a, b=b: torch.mm(a, b), repeats)
    return found
