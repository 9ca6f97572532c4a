"""Parameters of a training run by layer, and the operations of its optimizer, from a config alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from dsv4.analysis.inventory import TensorSpec, tensor_inventory
from dsv4.config import ModelConfig

ADAMW = ("embed", "head", "norms")  # components; its few vectors besides are left out here
NEWTON_SCHULZ_STEPS = 10
ROUNDED = ("I8", "F8_E4M3")  # stored dtypes of the weights that `run.precision` rounds
QUANTIZED = (*ROUNDED, "BF16")  # stored dtypes that quantization-aware training imitates


@dataclass(frozen=True)
class Weights:
    """Parameters of one part of the model."""

    dense: int = 0  # all but routed experts
    experts: int = 0
    adamw: int = 0  # of these, those with two moments
    rounded: int = 0  # of these, those stored as FP8 or FP4
    quantized: int = 0  # of these, those stored in 16 bits or fewer

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def on_rank(self, expert: int) -> Weights:
        """Whole parameters of a rank that holds one of `expert` parts of the experts, all of which are rounded."""
        others = self.experts - self.experts // expert
        return Weights(
            self.dense, self.experts - others, self.adamw, self.rounded - others, self.quantized - others
        )  # fmt: skip

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.dense + other.dense, self.experts + other.experts, self.adamw + other.adamw,
            self.rounded + other.rounded, self.quantized + other.quantized,
        )  # fmt: skip


@lru_cache(maxsize=16)
def weights_by_part(config: ModelConfig) -> dict[str, Weights]:
    """Parameters of "layers.0" and so on, "mtp.0", "embed" and "head" (the read-out with its norm)."""
    found: dict[str, Weights] = {}
    for spec in tensor_inventory(config, "official"):
        if not spec.parameters:
            continue
        expert = spec.component == "routed_experts"
        part = Weights(
            dense=0 if expert else spec.parameters,
            experts=spec.parameters if expert else 0,
            adamw=spec.parameters if spec.component in ADAMW else 0,
            rounded=spec.parameters if spec.dtype in ROUNDED else 0,
            quantized=spec.parameters if spec.dtype in QUANTIZED else 0,
        )
        name = _part(spec)
        found[name] = found.get(name, Weights()) + part
    return found


def _part(spec: TensorSpec) -> str:
    first, second = spec.name.split(".")[:2] if "." in spec.name else (spec.name, "")
    if first in ("layers", "mtp"):
        return f"{first}.{second}"
    return "embed" if first == "embed" else "head"


@lru_cache(maxsize=16)
def optimizer_flops(config: ModelConfig) -> int:
    """FLOPs of one Muon step: per matrix [n, m], n <= m, and iteration n n m + n n n + 2 n n m (symmetric products)."""
    total = 0
    for spec in tensor_inventory(config, "bf16"):
        if spec.component in ADAMW or len(spec.shape) < 2 or not spec.parameters:
            continue
        count = _matrices(spec, config)
        rows, columns = spec.shape[0] // count, prod(spec.shape[1:])
        total += count * newton_schulz_flops(rows, columns)
    return total


def newton_schulz_flops(rows: int, columns: int) -> int:
    """FLOPs of Muon's iterations on one matrix."""
    n, m = min(rows, columns), max(rows, columns)
    return NEWTON_SCHULZ_STEPS * (3 * n * n * m + n**3)


def _matrices(spec: TensorSpec, config: ModelConfig) -> int:
    """Independent matrices in a weight, one below the other: model/parameters.py."""
    name = spec.name
    if name.endswith(("compressor.wkv.weight", "compressor.wgate.weight")):  # a window series each
        return spec.shape[0] // (config.index_head_dim if ".indexer." in name else config.head_dim)
    if name.endswith("indexer.wq_b.weight"):
        return config.index_n_heads
    if name.endswith("wq_b.weight"):
        return config.num_attention_heads
    return config.o_groups if name.endswith("wo_a.weight") else 1
