"""The least time and memory that the machine allows: bytes over bandwidth, operations over peak; and growth laws."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.analysis.flops import decode_flops
from dsv4.analysis.inventory import tensor_inventory
from dsv4.analysis.parameters import count_parameters
from dsv4.config import ModelConfig

FP32_BYTES = 4
FLOPS_EVERY = 64  # positions between two evaluations of the FLOP count, which is smooth between them


def decode_floor(config: ModelConfig, ceilings: dict[str, float]) -> float:
    """Seconds a token: every weight that it uses read once in fp32 (caches not counted), or its operations."""
    active = count_parameters(config).active
    read = active * FP32_BYTES / ceilings["read_bytes_per_s"]
    return max(read, 2 * active / ceilings["fp32_flop_per_s"])


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Operations of a prompt, the head for its last token only."""
    head = decode_flops(config, 1).terms["head"]
    contexts = range(1, length + 1, FLOPS_EVERY)
    body = sum(
        min(FLOPS_EVERY, length + 1 - first) * (decode_flops(config, first + FLOPS_EVERY // 2).raw - head)
        for first in contexts
    )
    return body + head


def prefill_floor(config: ModelConfig, length: int, ceilings: dict[str, float]) -> float:
    """Seconds of a prompt: its operations at the fp32 matrix rate, or all weights read once."""
    weights = count_parameters(config).total * FP32_BYTES
    return max(prefill_flops(config, length) / ceilings["fp32_flop_per_s"], weights / ceilings["read_bytes_per_s"])


def memory_floor(config: ModelConfig) -> float:
    """Bytes: the weights in fp32."""
    return float(count_parameters(config).total * FP32_BYTES)


def stored_bytes(config: ModelConfig) -> int:
    """Bytes of the main model's weights as the official layout stores them."""
    return sum(spec.num_bytes for spec in tensor_inventory(config) if not spec.name.startswith("mtp."))


def token_bytes(config: ModelConfig) -> int:
    """Bytes of the main model's weights, as the official layout stores them, that one token reads."""
    always = routed = 0
    for spec in tensor_inventory(config):
        if spec.name.startswith(("mtp.", "embed.")) or spec.component == "tid2eid":
            continue  # an embedding and a row of a hash table: look-ups
        if ".experts." in spec.name:
            routed += spec.num_bytes
        else:
            always += spec.num_bytes
    return always + routed * config.num_experts_per_tok // config.n_routed_experts


def matrix_rate(ceilings: dict[str, float]) -> float:
    """The faster of the measured matrix products, FLOP a second."""
    return max(ceilings["fp32_flop_per_s"], ceilings["bf16_flop_per_s"])


@dataclass(frozen=True)
class Growth:
    """Memory at a length that was not run, from two that were."""

    line: float  # along a straight line: too little, for a curve that bends upwards
    parabola: float  # a + b * length^2: what attention scores of whole prompts cost


def extrapolate(small: tuple[int, float], large: tuple[int, float], length: int) -> Growth:
    (x0, y0), (x1, y1) = small, large
    linear = y1 + (y1 - y0) / (x1 - x0) * (length - x1)
    square = y1 + (y1 - y0) / (x1**2 - x0**2) * (length**2 - x1**2)
    return Growth(linear, square)
