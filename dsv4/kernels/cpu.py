"""Loader of the CPU kernels, dsv4._native: loaded once, with an instruction set and a thread count.

DSV4_ISA=portable, avx2, avx512, avx512_vnni, avx512_bf16 or amx and DSV4_THREADS=n force the choice. An unknown or
unsupported value raises KernelChoiceError. backends.py decides which operations run here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

MOST_THREADS = 1024  # of the module
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


class KernelChoiceError(RuntimeError):
    """DSV4_KERNELS, DSV4_ISA or DSV4_THREADS asks for something unavailable."""


@dataclass(frozen=True)
class Native:
    """The loaded module and its settings."""

    module: ModuleType
    isa: str
    follows_torch: bool  # thread count synced to torch.get_num_threads()

    def describe(self) -> str:
        """ "native (avx2, 3 threads)"."""
        threads: int = self.module.threads()
        return f"native ({self.isa}, {threads} thread{'s' if threads > 1 else ''})"


_native: Native | None = None
_torch_threads = 0  # torch's thread count at the last sync


def load() -> Native | str:
    """The module with the environment's settings applied, or the reason for its absence."""
    global _native
    if _native is not None:
        return _native
    isa, threads = setting("DSV4_ISA", ISAS), _threads()
    module, reason = _import()
    if module is None:
        return reason
    usable: list[str] = module.isas()
    if isa and isa not in usable:
        raise KernelChoiceError(f"DSV4_ISA is {isa}, which this machine cannot run; it can: {', '.join(usable)}")
    isa = isa or usable[-1]
    module.select(isa)
    if threads:
        module.set_threads(threads)
    _native = Native(module, isa, follows_torch=not threads)
    follow_torch_threads()
    return _native


def kernels() -> ModuleType:
    """dsv4._native, its thread count synced to torch.get_num_threads()."""
    native = load()
    assert isinstance(native, Native), native
    follow_torch_threads()
    return native.module


def follow_torch_threads() -> None:
    """Sync the native thread count to torch.get_num_threads(), unless DSV4_THREADS sets it."""
    global _torch_threads
    if _native is not None and _native.follows_torch:
        import torch

        threads = torch.get_num_threads()
        if threads != _torch_threads:
            _native.module.set_threads(min(threads, MOST_THREADS))
            _torch_threads = threads


def check_settings() -> None:
    """KernelChoiceError if DSV4_ISA or DSV4_THREADS has an invalid value."""
    setting("DSV4_ISA", ISAS)
    _threads()


def setting(variable: str, allowed: tuple[str, ...]) -> str:
    """Value of an environment variable, "" if unset; KernelChoiceError if it is not one of `allowed`."""
    value = os.environ.get(variable, "")
    if value and value not in allowed:
        raise KernelChoiceError(f"{variable} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def _threads() -> int:
    """DSV4_THREADS, 0 if unset."""
    value = os.environ.get("DSV4_THREADS", "")
    if not value:
        return 0
    # Python refuses to convert thousands of digits.
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= MOST_THREADS):
        raise KernelChoiceError(f"DSV4_THREADS is {value!r}; allowed: 1 to {MOST_THREADS}")
    return int(value)


def _import() -> tuple[ModuleType | None, str]:
    """dsv4._native, or None and the reason."""
    try:
        return import_module("dsv4._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "dsv4._native":
            raise
        return None, _build_reason()
    except ImportError as error:
        return None, f"dsv4._native cannot be loaded: {error}"


def _build_reason() -> str:
    """Reason recorded by an install that could not build the module. An editable install has two dsv4 folders."""
    for folder in import_module("dsv4").__path__:
        note = Path(folder) / "_native_reason.txt"
        if note.is_file():
            return note.read_text(encoding="utf-8").strip()
    return "dsv4._native is not installed; pip install builds it, in a checkout make setup"
