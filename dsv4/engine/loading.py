"""Loads a model folder for the engine, after checking that it fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from dsv4.analysis import StorageLayout
from dsv4.checkpoint import load_model
from dsv4.checkpoint.folder import Checkpoint
from dsv4.config import PAGE_TOKENS, ModelConfig
from dsv4.engine.capacity import LoadPlan, check_fit, need_of, total_need, ways_out
from dsv4.engine.config import DEFAULT_MAX_MODEL_LEN, DTYPES, EngineConfig
from dsv4.engine.machine import cuda_memory, host_memory
from dsv4.kernels import backends
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
        check_capacities([folder], config)
    return load_model(
        folder, device=config.device, dtype=dtype, numerics=config.numerics, check_values=config.check_values
    )


def resolve_max_model_len(requested: int | None, config: ModelConfig, num_pages: int | None = None) -> int:
    """Token limit per request: `requested`, or a default within the limit of the model and of the cache's pages.

    ValueError beyond the limit: every request that is accepted can run alone.
    """
    limit, owner = config.max_position_embeddings, "the model's max_position_embeddings"
    if num_pages is not None and num_pages * PAGE_TOKENS < limit:
        limit, owner = num_pages * PAGE_TOKENS, f"the cache has num_pages = {num_pages} of {PAGE_TOKENS} tokens"
    if requested is None:
        return min(limit, DEFAULT_MAX_MODEL_LEN)
    if requested > limit:
        raise ValueError(f"max_model_len is {requested}; allowed: [2, {limit}] ({owner})")
    return requested


def check_capacities(folders: Sequence[Path], config: EngineConfig) -> None:
    """CapacityError for folders that cannot be loaded together, warnings in the log for ones that will be slow or grow.

    Does nothing if the system does not report its memory.
    """
    on_cpu = torch.device(config.device).type == "cpu"
    memory = host_memory() if on_cpu else cuda_memory(config.device)
    if memory is None:
        return
    plans = [_plan(folder, config, on_cpu) for folder in folders]
    need = total_need([need_of(plan) for plan in plans])
    largest = max(plans, key=lambda plan: need_of(plan).at_start)
    names = ", ".join(map(str, folders))
    for warning in check_fit(names, need, memory, ways_out(largest, memory, backends.describe())):
        logger.warning(warning)


def _plan(folder: Path, config: EngineConfig, on_cpu: bool) -> LoadPlan:
    dtype = resolve_dtype(config.dtype, config.device)
    longest = config.max_model_len or DEFAULT_MAX_MODEL_LEN
    if config.num_pages is not None:
        longest = min(longest, config.num_pages * PAGE_TOKENS)
    with Checkpoint(folder) as checkpoint:
        model, layout = checkpoint.config, cast(StorageLayout, checkpoint.layout)
    return LoadPlan(
        model,
        layout,
        keeps_stored=on_cpu and dtype == torch.float32 and backends.native_module() is not None,
        itemsize=dtype.itemsize,
        max_num_seqs=config.max_num_seqs,
        max_model_len=min(longest, model.max_position_embeddings),
    )
