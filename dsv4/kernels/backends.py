"""Backend of each operation: the reference in plain torch, or the native kernels of the CPU (cpu.py).

An operation runs natively if all of these hold, else on the reference:
- the native kernels are installed, and DSV4_KERNELS is not "reference";
- its tensors are fp32 on the CPU, of newton_schulz also BF16;
- the instruction set has the operation: newton_schulz is there with AVX2 and AVX-512, on BF16 with AVX-512 BF16 alone,
  where AMX is not used;
- no gradient is recorded through it, or its native rung has a backward.
So DSV4_KERNELS=reference means plain torch throughout, and training runs the operations of inference, bit for bit.
(model/ chooses the fused forward of inference.)

Resolved on first use and logged once. KernelChoiceError if DSV4_KERNELS=native cannot be satisfied.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from dsv4.kernels import cpu
from dsv4.kernels.cpu import KernelChoiceError

if TYPE_CHECKING:
    from torch import Tensor, dtype

BACKENDS = ("native", "reference")

logger = logging.getLogger("dsv4")


@dataclass(frozen=True)
class Rung:
    """Conditions under which an operation's native.py runs."""

    backward: bool = True  # has a gradient
    # Dtype of its tensors -> instruction sets that have it; None: all.
    isas: dict[str, tuple[str, ...] | None] = field(default_factory=lambda: {"float32": None})


_VECTORS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")

# Operation (a folder of kernels/) -> its native rung.
NATIVE: dict[str, Rung] = {
    "attention": Rung(),
    "compressor": Rung(),
    "cross_entropy": Rung(),
    "grouped_linear": Rung(),
    "hadamard": Rung(),
    "index_loss": Rung(),
    "indexer": Rung(backward=False),
    "linear": Rung(),
    "mhc": Rung(),
    "newton_schulz": Rung(backward=False, isas={"float32": _VECTORS, "bfloat16": ("avx512_bf16",)}),
    "norm": Rung(),
    "quant": Rung(),
    "rope": Rung(),
    "router": Rung(),
    "sampling": Rung(backward=False),
    "sinkhorn": Rung(backward=False),
    "swiglu": Rung(),
    "topk": Rung(backward=False),
}


@dataclass(frozen=True)
class _Choice:
    native: cpu.Native | None
    requested: bool = False  # DSV4_KERNELS=native
    reason: str = ""  # for running the reference


_lock = threading.Lock()
_choice: _Choice | None = None


def native_module() -> ModuleType | None:
    """dsv4._native, or None if the reference kernels run."""
    native = _chosen().native
    return native.module if native is not None else None


def requested() -> bool:
    """True if DSV4_KERNELS=native asks for the native kernels, so that their absence is an error."""
    return _chosen().requested


def uses_native(operation: str, *tensors: Tensor | None) -> bool:
    """True if the operation runs natively on these tensors, by the rule above."""
    module, rung = native_module(), NATIVE[operation]
    given = [t for t in tensors if t is not None]
    if module is None or any(t.device.type != "cpu" for t in given):
        return False
    for t in given:
        isas = rung.isas.get(_dtype_name(t.dtype), ())
        if isas is not None and module.selected() not in isas:
            return False
    return rung.backward or not records(*given)


def stored_as_widened() -> bool:
    """True if products with weights in FP4, FP8 or BF16 have the bits of those with the same weights in fp32.

    AMX multiplies the former alone, in the order of its tiles.
    """
    module = native_module()
    return module is None or module.selected() != "amx"


@cache
def _dtype_name(dtype: dtype) -> str:
    return str(dtype).removeprefix("torch.")


def records(*tensors: Tensor | None) -> bool:
    """True if torch records a gradient through an operation on these tensors."""
    import torch

    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def name() -> str:
    """ "native" or "reference"."""
    return "reference" if native_module() is None else "native"


def describe() -> str:
    """One line: the kernels that run, with their settings or the reason for the reference."""
    choice = _chosen()
    if choice.native is None:
        return f"kernels: reference, because {choice.reason}"
    return f"kernels: {choice.native.describe()}"


@cache
def decline(reason: str) -> None:
    """Warn, once per reason, that the reference runs in place of the native kernels. KernelChoiceError if
    DSV4_KERNELS=native asks for them."""
    if requested():
        raise KernelChoiceError(f"DSV4_KERNELS is native, but {reason}")
    logger.warning(f"kernels: reference, because {reason}")


def _chosen() -> _Choice:
    global _choice
    if _choice is not None:
        return _choice
    with _lock:
        if _choice is None:
            _choice = _choose()
            # Python shows a warning on stderr even if logging is not configured.
            logger.log(logging.INFO if _choice.native else logging.WARNING, describe())
    return _choice


def _choose() -> _Choice:
    asked = cpu.setting("DSV4_KERNELS", BACKENDS)
    cpu.check_settings()
    if asked == "reference":
        return _Choice(None, reason="DSV4_KERNELS=reference")
    native = cpu.load()
    if isinstance(native, cpu.Native):
        return _Choice(native, requested=asked == "native")
    if asked == "native":
        raise KernelChoiceError(f"DSV4_KERNELS is native, but the native kernels are missing: {native}")
    return _Choice(None, reason=native)
