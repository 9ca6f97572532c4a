"""Loads a model folder for the engine, after checking that it fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from dsv4.analysis import StorageLayout
from dsv4.analysis.kv import KvFormat
from dsv4.cache.formats import cache_dtype
from dsv4.checkpoint import load_model
from dsv4.checkpoint.expert_memory import ExpertMemory, ExpertMemoryError, limit_experts
from dsv4.checkpoint.folder import Checkpoint
from dsv4.config import PAGE_TOKENS
from dsv4.engine.cache_size import CacheRoom, room_for
from dsv4.engine.capacity import LoadPlan, check_fit, kept_stream_bytes, need_of, total_need, ways_out
from dsv4.engine.config import DTYPES, EngineConfig
from dsv4.engine.machine import Memory, cuda_memory, host_memory
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredStack, StoredWeight
from dsv4.model.backend import EXPERT_MEMORY
from dsv4.model.transformer import Transformer

logger = logging.getLogger("dsv4")


def check_device(device: str, key: str = "device") -> None:
    """ValueError, naming `key`, for another device than the CPU or a CUDA device that this machine has."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"{key} is {device!r}; allowed: cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= found:
        raise ValueError(f"{key} is {device!r}; torch finds {found} CUDA devices here")


def resolve_dtype(dtype: torch.dtype | str, device: str) -> torch.dtype:
    """Dtype of matrices. "auto": float32 on the CPU, as its kernels compute in it, bfloat16 on a GPU."""
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
    if config.expert_memory is not None and not _keeps_stored(config.device, dtype):
        raise ExpertMemoryError(
            f"expert_memory is {config.expert_memory}, but on {config.device} in {dtype} with {backends.describe()}"
            " experts are copied into memory; allowed: None, or the native kernels on the CPU in torch.float32"
        )
    if config.check_memory:
        check_capacity([folder], config)
    return load_model(
        folder, device=config.device, dtype=dtype, numerics=config.numerics, check_values=config.check_values
    )


def _kv_format(config: EngineConfig, dtype: torch.dtype) -> KvFormat | None:
    """Format of the cache for the count of its bytes; None: the dtype of the matrices."""
    stored = cache_dtype(config.kv_cache_dtype, config.numerics, dtype)
    if config.kv_cache_dtype == "auto":
        return "fp8+fp4" if stored == "shipped" else None
    return "bf16" if stored == torch.bfloat16 else "fp32"


def limit_expert_memory(model: object, budget: int | None) -> ExpertMemory | None:
    """Limit of a model's experts in memory: a new one of `budget` bytes, or None: the one that it has, if any."""
    if budget is None:
        return getattr(model, EXPERT_MEMORY, None)
    if not isinstance(model, Transformer):
        raise ExpertMemoryError(f"expert_memory is {budget}, but the model is a {type(model).__name__}; allowed: None")
    return limit_experts(model, budget)


def _keeps_stored(device: str, dtype: torch.dtype) -> bool:
    """True if `load_model` leaves matrices in their files as they are stored."""
    return torch.device(device).type == "cpu" and dtype == torch.float32 and backends.native_module() is not None


def cache_room(model: Transformer, config: EngineConfig) -> CacheRoom | None:
    """Room for the cache of a model that is loaded; None where the memory is not to be looked at, or not told."""
    memory = _memory_of(str(model.device)) if config.check_memory else None
    if memory is None:
        return None
    tensors = (*model.parameters(), *model.buffers())
    stored = [tensor for tensor in tensors if isinstance(tensor, StoredWeight)]
    experts = sum(tensor.stored_bytes for tensor in stored if isinstance(tensor, StoredStack))
    mapped = sum(tensor.stored_bytes for tensor in stored)
    if config.expert_memory is not None:
        mapped -= max(0, experts - config.expert_memory)
    config = replace(config, numerics=model.numerics)
    kv_format = _kv_format(config, model.dtype) or ("bf16" if model.dtype.itemsize == 2 else "fp32")
    streams = kept_stream_bytes(model.config, model.dtype.itemsize) if config.speculate else 0
    return room_for(model.config, kv_format, config.max_num_seqs, mapped, memory, streams)


def _memory_of(device: str) -> Memory | None:
    kind = torch.device(device).type
    return host_memory() if kind == "cpu" else cuda_memory(device) if kind == "cuda" else None


def check_capacity(folders: Sequence[Path], engine: EngineConfig) -> None:
    """CapacityError for folders that cannot be loaded together, warnings in the log for ones that will be slow or grow.

    Does nothing if the system does not report its memory.
    """
    memory = _memory_of(engine.device)
    if memory is None:
        return
    plans = [_plan(folder, engine) for folder in folders]
    need = total_need([need_of(plan) for plan in plans])
    largest = max(plans, key=lambda plan: need_of(plan).at_start)
    names = ", ".join(map(str, folders))
    for warning in check_fit(names, need, memory, ways_out(largest, memory, backends.describe())):
        logger.warning(warning)


def _plan(folder: Path, engine: EngineConfig) -> LoadPlan:
    dtype = resolve_dtype(engine.dtype, engine.device)
    longest = engine.max_model_len or PAGE_TOKENS  # by default as long as the memory that is left allows
    if engine.num_pages is not None:
        longest = min(longest, engine.num_pages * PAGE_TOKENS)
    with Checkpoint(folder) as checkpoint:
        config, layout = checkpoint.config, cast(StorageLayout, checkpoint.layout)
    return LoadPlan(
        config,
        layout,
        keeps_stored=_keeps_stored(engine.device, dtype),
        itemsize=dtype.itemsize,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=min(longest, config.max_position_embeddings),
        kv_format=_kv_format(engine, dtype),
        expert_memory=engine.expert_memory,
        speculates=engine.speculate > 0,
    )
