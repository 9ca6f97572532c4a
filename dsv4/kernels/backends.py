"""Backend of each operation: the reference in torch, or the native kernels of the CPU (cpu.py).

DSV4_KERNELS=native or reference forces the choice, which is made at the first question and logged once. What it asks
for and cannot have raises KernelChoiceError. DSV4_KERNELS=reference computes everything in plain torch.
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
class _Choice:
    native: cpu.Native | None
    asked: bool = False  # DSV4_KERNELS=native
    reason: str = ""  # for the reference


_lock = threading.Lock()
_choice: _Choice | None = None


def native_module() -> ModuleType | None:
    """dsv4._native, None when the reference kernels run."""
    native = _chosen().native
    return native.module if native is not None else None


def takes(*tensors: Tensor) -> bool:
    """True if the native kernels run and compute with these: fp32 on the CPU, outside autocast."""
    import torch

    return (
        native_module() is not None
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def trains() -> bool:
    """True if products that want a gradient run natively too: where DSV4_KERNELS=native asks for it.

    Without that torch computes them, which is a few percent faster on the processors that MKL was made for.
    """
    return _chosen().asked


def name() -> str:
    """ "native" or "reference"."""
    return "reference" if native_module() is None else "native"


def describe() -> str:
    """One line: the kernels that run, with their settings or the reason."""
    choice = _chosen()
    if choice.native is None:
        return f"kernels: reference, because {choice.reason}"
    return f"kernels: {choice.native.describe()}"


@cache
def decline(reason: str) -> None:
    """Say, once for each reason, that the reference runs in place of the native kernels. KernelChoiceError where
    DSV4_KERNELS=native asks for these."""
    if _chosen().asked:
        raise KernelChoiceError(f"DSV4_KERNELS is native, but {reason}")
    logger.warning(f"kernels: reference, because {reason}")


def _chosen() -> _Choice:
    global _choice
    if _choice is not None:
        return _choice
    with _lock:
        if _choice is None:
            _choice = _choose()
            # Python shows a warning on stderr even where nobody has set logging up.
            logger.log(logging.INFO if _choice.native else logging.WARNING, describe())
    return _choice


def _choose() -> _Choice:
    asked = cpu.setting("DSV4_KERNELS", BACKENDS)
    cpu.check_settings()
    if asked == "reference":
        return _Choice(None, reason="DSV4_KERNELS=reference")
    native = cpu.load()
    if isinstance(native, cpu.Native):
        return _Choice(native, asked=asked == "native")
    if asked == "native":
        raise KernelChoiceError(f"DSV4_KERNELS is native, but the native kernels are missing: {native}")
    return _Choice(None, reason=native)
