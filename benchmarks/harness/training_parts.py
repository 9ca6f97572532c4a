"""Parts of a training step: operations, the time that they take here at least, and the time that they took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any

from dsv4.analysis.flops import decode_flops
from dsv4.analysis.training_flops import BACKWARD, attention_pairs
from dsv4.config import ModelConfig

# Native functions (dsv4/_native.pyi) by part; calls of GROUPED on several groups belong to the experts.
PARTS: dict[str, tuple[str, ...]] = {
    "projections": ("linear", "round_factors", "pack_factors", "fake_quant"),
    "experts": ("grouped_linear", "swiglu", "swiglu_gradient", "route", "route_gradient"),
    "attention": ("attend_batch", "attend_gradient", "compress_batch", "compress_gradient", "rotate", "rotation"),
    "indexer": ("index_top_k", "index_loss", "hadamard"),
    "mHC and norms": ("hc_pre", "hc_post", "hc_head", "hc_pre_gradient", "hc_post_gradient", "rms_norm",
                      "rms_norm_gradient"),
    "head": ("cross_entropy",),
    "optimizer": ("newton_schulz",),
}  # fmt: skip
GROUPED = ("input_gradients", "weight_gradients")
REST = "other"  # torch and Python
MUON = "optimizer"
MUON_STEPS = 10


def part_of(function: str, arguments: Sequence[Any]) -> str | None:
    """Part of a call of dsv4._native, or None for functions that compute nothing."""
    if function in GROUPED:
        return "experts" if len(arguments[1 if function == "input_gradients" else 2]) > 1 else "projections"
    return next((part for part, functions in PARTS.items() if function in functions), None)


class _Timed:
    """dsv4._native with a clock around each of its functions."""

    def __init__(self, module: Any, seconds: dict[str, float], clock: Callable[[], float]) -> None:
        self._module, self._seconds, self._clock = module, seconds, clock

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function):
            return function

        def call(*arguments: Any, **named: Any) -> Any:
            started = self._clock()
            try:
                return function(*arguments, **named)
            finally:
                part = part_of(name, arguments)
                if part is not None:
                    self._seconds[part] = self._seconds.get(part, 0.0) + self._clock() - started

        return call


@contextmanager
def timed_parts(busy: bool) -> Iterator[dict[str, float]]:
    """Seconds by part of all native calls in this context; busy: of processor time."""
    from dsv4.kernels import cpu

    seconds: dict[str, float] = {}
    timed, own = _Timed(cpu.kernels(), seconds, process_time if busy else perf_counter), cpu.kernels

    def kernels() -> Any:
        own()
        return timed

    cpu.kernels = kernels
    try:
        yield seconds
    finally:
        cpu.kernels = own


def operations(
    config: ModelConfig, lengths: Sequence[int], bf16_gradients: bool = True
) -> dict[str, tuple[float, float]]:
    """(operations, share of them that bf16 training computes at the rate of BF16) by part, without the optimizer.

    Forward and backward of documents of these lengths, 2 per multiply-add, without recomputation. bf16_gradients: False
    where the products of gradients run at fp32's rate (kernels/precision.py:multiplies_bf16).
    """
    terms, tokens, both = decode_flops(config, 0).terms, sum(lengths), 1 + BACKWARD
    experts = terms["experts"] * config.num_experts_per_tok // (config.num_experts_per_tok + config.n_shared_experts)
    # The layers' and the shared expert's products and, in fp32, those of router, compressors and indexer.
    rounded = terms["attention linears"] + terms["experts"] - experts
    exact = terms["router"] + terms.get("compressors", 0) + terms.get("indexer linears", 0)
    fast = 1.0 if bf16_gradients else 1 / both
    attention, indexer = (sum(pairs) for pairs in zip(*(attention_pairs(config, n) for n in lengths), strict=True))
    return {
        "projections": (both * tokens * (rounded + exact), fast * rounded / (rounded + exact)),
        "experts": (both * tokens * experts, fast),
        "attention": (both * attention, 0.0),
        "indexer": (both * indexer, 0.0),
        "mHC and norms": (both * tokens * terms["mHC"], 0.0),
        "head": (both * tokens * terms["head"], BACKWARD / both if bf16_gradients else 0.0),
    }


def muon_operations(shapes: Sequence[tuple[int, int]]) -> float:
    """Operations of Muon's iterations on matrices of these shapes; products of X X^T compute one triangle."""
    total = 0.0
    for rows, columns in shapes:
        n, m = min(rows, columns), max(rows, columns)
        total += MUON_STEPS * (n * n * m + n * n * n + 2 * n * n * m)
    return total


def floors(
    parts: dict[str, tuple[float, float]], ceilings: dict[str, float], bf16: bool, per: str = ""
) -> dict[str, float]:
    """Seconds of each part at the machine's product rates; Muon multiplies BF16 in any precision.

    per: "processor_" for seconds of a processor, "" for the measurement's own.
    """
    fp32, fast = (ceilings[f"{name}_flop_per_{per}s"] for name in ("fp32", "bf16"))
    fast = max(fp32, fast)
    share = {name: rounded if bf16 or name == MUON else 0.0 for name, (_, rounded) in parts.items()}
    return {name: flops * (share[name] / fast + (1 - share[name]) / fp32) for name, (flops, _) in parts.items()}
