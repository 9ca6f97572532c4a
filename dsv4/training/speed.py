"""Speed of a run: operations per second, their share of the machine's products (MFU), memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from dsv4.analysis.adapters import Adapters
from dsv4.analysis.training_flops import training_flops
from dsv4.config import ModelConfig
from dsv4.training.attention_phase import AttentionPhase

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is timed
REPEATS = 5


def product_rate(device: torch.device, dtype: torch.dtype = torch.float32, processes: int = 1) -> float:
    """FLOPs per second of large matrix products in `dtype` here: the best of REPEATS, of one process times `processes`.

    The best, because other work on the machine only slows it down.
    """
    side = SIDE.get(device.type, SIDE["cpu"])
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS + 1):  # one more, which warms up
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return processes * 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the GPU's tensors, on a CPU of this process without its helpers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class SpeedMeter:
    """Measures steps of a model on a machine whose products `measure_rate` times, in FLOPs per second.

    A step quicker than the rate shows that other work slowed its measurement down: it is measured again.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        measure_rate: Callable[[], float],
        adapters: Adapters | None = None,
    ) -> None:
        """adapters: are trained in place of every parameter."""
        self.config, self.device, self.adapters = config, device, adapters
        self._measure_rate, self.rate = measure_rate, measure_rate()

    def measure(self, lengths: tuple[int, ...], phase: AttentionPhase, mtp: bool, seconds: float) -> dict[str, Any]:
        """Metrics of a step on documents of these lengths: operations per second, MFU, peak memory in bytes."""
        speed = training_flops(self.config, lengths, phase, mtp, self.adapters) / seconds
        if speed > self.rate:
            self.rate = max(self.rate, self._measure_rate())
        return {
            "flops_per_second": round(speed),
            "mfu": round(speed / self.rate, 4),
            "peak_memory_bytes": peak_memory(self.device),
        }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
