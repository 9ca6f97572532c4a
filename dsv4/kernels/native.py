"""Which kernels run on CPU: the native ones of dsv4._native, or the reference in torch. Chosen at the first question.

DSV4_KERNELS=native or reference, DSV4_ISA=portable, avx2, avx512, avx512_vnni, avx512_bf16 or amx, and DSV4_THREADS=n
force the choice. What they ask for and cannot have raises KernelChoiceError.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KERNELS = ("native", "reference")
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")

logger = logging.getLogger("dsv4")


class KernelChoiceError(RuntimeError):
    """DSV4_KERNELS, DSV4_ISA or DSV4_THREADS asks for what is not there."""


@dataclass(frozen=True)
class _Choice:
    module: ModuleType | None
    isa: str = ""
    follows_torch: bool = False  # as many threads as torch has
    asked: bool = False  # DSV4_KERNELS=native
    reason: str = ""  # for the reference


_lock = threading.Lock()
_choice: _Choice | None = None
_torch_threads = 0  # as last followed


def module() -> ModuleType | None:
    """dsv4._native, None when the reference kernels run."""
    return _chosen().module


def kernels() -> ModuleType:
    """dsv4._native, with as many threads as torch has by now."""
    follow_torch_threads()
    found = module()
    assert found is not None, "the reference kernels run"
    return found


def takes(*tensors: Tensor) -> bool:
    """Whether the native kernels run and compute with these: fp32 on the CPU, outside autocast."""
    import torch

    return (
        module() is not None
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def trains() -> bool:
    """Whether products that want a gradient run natively too: where DSV4_KERNELS=native asks for it.

    Without that torch computes them, which is a few percent faster on the processors that MKL was made for.
    """
    return _chosen().asked


def name() -> str:
    """ "native" or "reference"."""
    return "reference" if module() is None else "native"


def describe() -> str:
    """One line: which kernels run, on what or why."""
    choice = _chosen()
    if choice.module is None:
        return f"kernels: reference, because {choice.reason}"
    threads: int = choice.module.threads()
    return f"kernels: native ({choice.isa}, {threads} thread{'s' if threads > 1 else ''})"


@cache
def decline(reason: str) -> None:
    """Say, once for each reason, that the reference runs in place of the native kernels. KernelChoiceError where
    DSV4_KERNELS=native asks for these."""
    if _chosen().asked:
        raise KernelChoiceError(f"DSV4_KERNELS is native, but {reason}")
    logger.warning(f"kernels: reference, because {reason}")


def follow_torch_threads() -> None:
    """Give the native kernels as many threads as torch has by now, unless DSV4_THREADS says how many."""
    global _torch_threads
    choice = _chosen()
    if choice.module is not None and choice.follows_torch:
        import torch

        threads = torch.get_num_threads()
        if threads != _torch_threads:
            choice.module.set_threads(threads)
            _torch_threads = threads


def _chosen() -> _Choice:
    global _choice
    if _choice is not None:
        return _choice
    with _lock:
        if _choice is None:
            _choice = _choose()
            follow_torch_threads()
            # Python shows a warning on stderr even where nobody has set logging up.
            logger.log(logging.INFO if _choice.module else logging.WARNING, describe())
    return _choice


def _choose() -> _Choice:
    kernels, isa, threads = _setting("DSV4_KERNELS", KERNELS), _setting("DSV4_ISA", ISAS), _threads()
    if kernels == "reference":
        return _Choice(None, reason="DSV4_KERNELS=reference")
    native, reason = _load()
    if native is None:
        if kernels == "native":
            raise KernelChoiceError(f"DSV4_KERNELS is native, but the native kernels are missing: {reason}")
        return _Choice(None, reason=reason)
    usable: list[str] = native.isas()
    if isa and isa not in usable:
        raise KernelChoiceError(f"DSV4_ISA is {isa}, which this machine cannot run; it can: {', '.join(usable)}")
    isa = isa or usable[-1]
    native.select(isa)
    if threads:
        native.set_threads(threads)
    return _Choice(native, isa, follows_torch=not threads, asked=kernels == "native")


def _setting(variable: str, allowed: tuple[str, ...]) -> str:
    """A variable's value, "" when it is not set."""
    value = os.environ.get(variable, "")
    if value and value not in allowed:
        raise KernelChoiceError(f"{variable} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def _threads() -> int:
    """DSV4_THREADS, 0 when it is not set."""
    value = os.environ.get("DSV4_THREADS", "")
    if value and not (value.isascii() and value.isdecimal() and int(value) > 0):
        raise KernelChoiceError(f"DSV4_THREADS is {value!r}; allowed: 1 or more")
    return int(value or 0)


def _load() -> tuple[ModuleType | None, str]:
    """dsv4._native, or None and why."""
    try:
        return import_module("dsv4._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "dsv4._native":
            raise
        return None, _build_reason()
    except ImportError as error:
        return None, f"dsv4._native cannot be loaded: {error}"


def _build_reason() -> str:
    """What the install noted when it could not build the module. In an editable install dsv4 lies in two folders."""
    for folder in import_module("dsv4").__path__:
        note = Path(folder) / "_native_reason.txt"
        if note.is_file():
            return note.read_text(encoding="utf-8").strip()
    return "dsv4._native is not installed; pip install builds it, in a checkout make setup"
