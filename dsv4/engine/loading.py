"""Loads a model folder for the engine, after checking that it fits into memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch

from dsv4.analysis import StorageLayout
from dsv4.checkpoint import load_model
from dsv4.checkpoint.folder import Checkpoint
from dsv4.config import PAGE_TOKENS
from dsv4.engine.cache_size import CacheRoom, room_for
from dsv4.engine.capacity import LoadPlan, check_fit, need_of, ways_out
from dsv4.engine.config import DTYPES, EngineConfig
from dsv4.engine.machine import Memory, cuda_memory, host_memory
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredWeight
from dsv4.model.transformer import Transformer

logger = logging.getLogger("dsv4")


def check_device(device: str) -> None:
    """ValueError for a device name unknown to torch, or for a CUDA device that this machine lacks."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed: cpu, cuda or cuda:N") from error
    found = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        raise ValueError(f"device is {device!r}; torch finds {found} CUDA devices here")


def resolve_dtype(dtype: torch.dtype | str, device: str) -> torch.dtype:
    """Dtype of matrices and cache. "auto": float32 on the CPU, as its kernels compute in it, bfloat16 on a GPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:  # EngineConfig checks names only, not values of other types
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}, or a torch.dtype")
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def load(folder: Path, config: EngineConfig) -> Transformer:
    """Load the folder's model; CapacityError before any weight is read if it cannot fit."""
    dtype = resolve_dtype(config.dtype, config.device)
    if config.check_memory:
        longest = config.max_model_len or PAGE_TOKENS  # by default as long as the memory that is left allows
        if config.num_pages is not None:
            longest = min(longest, config.num_pages * PAGE_TOKENS)
        check_capacity(folder, config.device, dtype, config.max_num_seqs, longest)
    return load_model(
        folder, device=config.device, dtype=dtype, numerics=config.numerics, check_values=config.check_values
    )


def cache_room(model: Transformer, config: EngineConfig) -> CacheRoom | None:
    """Room for the cache of a model that is loaded; None where the memory is not to be looked at, or not told."""
    memory = _memory_of(str(model.device)) if config.check_memory else None
    if memory is None:
        return None
    tensors = (*model.parameters(), *model.buffers())
    mapped = sum(tensor.stored_bytes for tensor in tensors if isinstance(tensor, StoredWeight))
    return room_for(model.config, model.dtype.itemsize, config.max_num_seqs, mapped, memory)


def _memory_of(device: str) -> Memory | None:
    kind = torch.device(device).type
    return host_memory() if kind == "cpu" else cuda_memory(device) if kind == "cuda" else None


def check_capacity(folder: Path, device: str, dtype: torch.dtype, max_num_seqs: int, max_model_len: int) -> None:
    """CapacityError for a folder that cannot be loaded, warnings in the log for one that will be slow or grow too big.

    Does nothing if the system does not report its memory.
    """
    on_cpu, memory = torch.device(device).type == "cpu", _memory_of(device)
    if memory is None:
        return
    with Checkpoint(folder) as checkpoint:
        config, layout = checkpoint.config, cast(StorageLayout, checkpoint.layout)
    plan = LoadPlan(
        config,
        layout,
        keeps_stored=on_cpu and dtype == torch.float32 and backends.native_module() is not None,
        itemsize=dtype.itemsize,
        max_num_seqs=max_num_seqs,
        max_model_len=min(max_model_len, config.max_position_embeddings),
    )
    for warning in check_fit(str(folder), need_of(plan), memory, ways_out(plan, memory, backends.describe())):
        logger.warning(warning)
