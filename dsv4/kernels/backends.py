"""Backend of each operation: the reference in plain torch, or the native kernels of the CPU (cpu.py).

An operation runs natively if all of these hold, else on the reference:
- the native kernels are installed, and DSV4_KERNELS is not "reference";
- DSV4_KERNELS is "native", or NATIVE says that the operation is native by default;
- its tensors are fp32 on the CPU, outside autocast;
- no gradient is recorded through it, or its native rung has a backward and DSV4_KERNELS is "native".
So DSV4_KERNELS=reference means plain torch throughout; with the variable unset, the layers in Python run the same
operations as training, except for products without gradient. (model/ chooses the fused forward of inference.)

Resolved on first use and logged once. KernelChoiceError if DSV4_KERNELS=native cannot be satisfied.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from dsv4.kernels import cpu
from dsv4.kernels.cpu import KernelChoiceError

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("native", "reference")

logger = logging.getLogger("dsv4")


@dataclass(frozen=True)
class Rung:
    """Conditions under which an operation's native.py runs."""

    by_default: bool = False  # also without DSV4_KERNELS=native, if no gradient is recorded
    backward: bool = False  # has a gradient; opt-in, since MKL is a few percent faster on Intel's processors


# Operation (a folder of kernels/) -> its native rung.
NATIVE: dict[str, Rung] = {
    "attention": Rung(),
    "compressor": Rung(),
    "grouped_linear": Rung(backward=True),
    "hadamard": Rung(),
    "indexer": Rung(),
    "linear": Rung(by_default=True, backward=True),
    "mhc": Rung(),
    "norm": Rung(),
    "quant": Rung(),
    "rope": Rung(),
    "router": Rung(),
    "sampling": Rung(by_default=True),
    "sinkhorn": Rung(),
    "swiglu": Rung(),
    "topk": Rung(),
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
    """True if DSV4_KERNELS=native asks for all native rungs."""
    return _chosen().requested


def uses_native(operation: str, *tensors: Tensor | None) -> bool:
    """True if the operation runs natively on these tensors, by the rule above."""
    rung = NATIVE[operation]
    if native_module() is None or not (rung.by_default or requested()):
        return False
    return supports(rung, *(t for t in tensors if t is not None))


def supports(rung: Rung, *tensors: Tensor) -> bool:
    """True if a native rung takes these tensors in torch's current modes (autocast, gradients)."""
    import torch

    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors) or torch.is_autocast_enabled("cpu"):
        return False
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded or (rung.backward and requested())


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
