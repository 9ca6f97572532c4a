"""Loads a model folder for the engine, after a look at whether it fits into memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch

from dsv4.analysis import StorageLayout
from dsv4.checkpoint import load_model
from dsv4.checkpoint.folder import Checkpoint
from dsv4.engine.capacity import LoadPlan, check_fit, need_of, ways_out
from dsv4.engine.machine import cuda_memory, host_memory
from dsv4.kernels import native
from dsv4.model.transformer import Transformer

DTYPES = ("auto", "bfloat16", "float32")

logger = logging.getLogger("dsv4")


def resolve_dtype(dtype: torch.dtype | str, device: str) -> torch.dtype:
    """The dtype of matrices and cache. "auto": float32 on the CPU, as its kernels compute, bfloat16 on a GPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}, or a torch.dtype")
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def load(
    folder: Path,
    device: str,
    dtype: torch.dtype,
    numerics: str,
    max_num_seqs: int,
    max_model_len: int,
    check_memory: bool = True,
    check_values: bool = True,
) -> Transformer:
    """The folder's model; CapacityError before anything of it is read where it cannot fit. `max_model_len`: at most.

    `check_values`: as of `dsv4.load`.
    """
    if check_memory:
        check_capacity(folder, device, dtype, max_num_seqs, max_model_len)
    return load_model(folder, device=device, dtype=dtype, numerics=numerics, check_values=check_values)


def check_capacity(folder: Path, device: str, dtype: torch.dtype, max_num_seqs: int, max_model_len: int) -> None:
    """CapacityError for a folder that cannot be loaded, warnings in the log for one that will be slow or grow too big.

    Nothing is said where the system does not tell its memory.
    """
    on_cpu = torch.device(device).type == "cpu"
    memory = host_memory() if on_cpu else cuda_memory(device)
    if memory is None:
        return
    with Checkpoint(folder) as checkpoint:
        config, layout = checkpoint.config, cast(StorageLayout, checkpoint.layout)
    plan = LoadPlan(
        config,
        layout,
        keeps_stored=on_cpu and dtype == torch.float32 and native.module() is not None,
        itemsize=dtype.itemsize,
        max_num_seqs=max_num_seqs,
        max_model_len=min(max_model_len, config.max_position_embeddings),
    )
    for warning in check_fit(str(folder), need_of(plan), memory, ways_out(plan, memory, native.describe())):
        logger.warning(warning)
