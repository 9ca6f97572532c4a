"""DeepSeek V4 in readable Python. Cheap to import: each public name loads its module, and torch, on first use."""

from __future__ import annotations

import os
import platform
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from dsv4.lazy import lazy_names

if TYPE_CHECKING:
    from dsv4 import post_training
    from dsv4.checkpoint import CheckpointError
    from dsv4.checkpoint import load_model as load
    from dsv4.config import ModelConfig
    from dsv4.engine import LLM, AsyncEngine, SamplingParams
    from dsv4.model.transformer import Transformer
    from dsv4.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "load",
    "post_training",
]

# Public name -> (module, name there), "" for the module.
_LAZY = {
    "AsyncEngine": ("dsv4.engine", "AsyncEngine"),
    "CheckpointError": ("dsv4.checkpoint", "CheckpointError"),
    "LLM": ("dsv4.engine", "LLM"),
    "ModelConfig": ("dsv4.config", "ModelConfig"),
    "SamplingParams": ("dsv4.engine", "SamplingParams"),
    "Tokenizer": ("dsv4.tokenizer", "Tokenizer"),
    "Transformer": ("dsv4.model.transformer", "Transformer"),
    "load": ("dsv4.checkpoint", "load_model"),
    "post_training": ("dsv4.post_training", ""),
}


__getattr__, __dir__ = lazy_names("dsv4", _LAZY)


def _pin_mkl_rounding() -> None:
    """Ask MKL for its strict reproducible mode, unless the user already chose one.

    By default MKL picks a kernel by the matrix sizes, so the same row times the same weights can round differently
    when other rows sit beside it. In strict mode a row's result does not depend on how many rows there are, which is
    what makes chunked, batched and cached forwards of the reference path equal bit for bit. MKL reads the variable at
    its first call, so it is set here, before any module of dsv4 imports torch.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as cpuinfo:
        text = cpuinfo.read()
    if "GenuineIntel" not in text:  # on other CPUs, even with AVX-512, MKL accepts the setting and rows still differ
        return
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= set(flags):
        os.environ.setdefault("MKL_CBWR", "AVX512,STRICT")
    elif "avx2" in flags:
        os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


def _shorten_openmp_waits() -> None:
    """Have the threads of GNU OpenMP sleep soon after a parallel part of torch, unless the user chose how they wait.

    By default they spin for milliseconds, on the processors that the native kernels' threads need next. Plain torch
    alone is faster with that, so it stays where the reference runs. OpenMP reads the variable when torch is imported.
    """
    if sys.platform != "linux" or "OMP_WAIT_POLICY" in os.environ or os.environ.get("DSV4_KERNELS") == "reference":
        return
    if PathFinder.find_spec("dsv4._native", __path__) is not None:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


_pin_mkl_rounding()
_shorten_openmp_waits()
