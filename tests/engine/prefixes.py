"""Tools of the tests of stored prefixes: a small model with every kind of layer, and the checks at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dsv4.cache import Cache
from dsv4.engine import LLM, RequestOutput, SamplingParams
from dsv4.engine.request import Request
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, tiny_config

CONFIG = tiny_config(schedule=(0, 4, 128, 4), index_topk=16, max_position_embeddings=4096)
IDS: list[int] = random_ids(CONFIG, 1500).tolist()
STRICT_MKL = torch.backends.mkl.is_available() and os.environ.get("MKL_CBWR", "").endswith("STRICT")
BITS = STRICT_MKL or backends.native_module() is not None  # batches of other sizes give the same bits


def greedy(max_tokens: int = 6, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, **options)


def sampled(seed: int, max_tokens: int = 6, **options: Any) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, logprobs=2, **options)


def bits(outputs: list[RequestOutput]) -> list[Any]:
    """Tokens, log-probabilities and alternatives."""
    return [(o.token_ids, o.logprobs, o.top_logprobs, o.finish_reason) for o in outputs]


def same(got: list[RequestOutput], want: list[RequestOutput]) -> bool:
    """To the bit where batches of other sizes give the same bits (see tests/model/test_chunking.py).

    Elsewhere a rounding may choose another token: the first ones' log-probabilities are compared.
    """
    if backends.native_module() is not None or STRICT_MKL:  # now: a test may have chosen the reference
        return bits(got) == bits(want)
    first = [[torch.tensor([o.logprobs[0] for o in outputs]) for outputs in (got, want)]]
    return all(torch.allclose(a, b, atol=1e-3) for a, b in first)


def cache_of(llm: LLM) -> Cache:
    cache = llm.core.runner.cache
    assert isinstance(cache, Cache)
    return cache


def assert_nothing_leaks(llm: LLM) -> None:
    """Rows are empty and free, and every page is free or held by stored prefixes alone; those can all go."""
    manager, cache = llm.core.scheduler.cache_manager, cache_of(llm)
    assert not llm.core.has_work and not any(cache.lengths) and (cache.block_table == -1).all()
    assert sorted(manager._free_slots) == list(range(cache.batch_size)) and not manager._running
    stored = manager.prefixes
    held = 0 if stored is None else stored.num_pages
    assert (cache.pool.num_used, cache.pool.num_shares) == (held, 0)
    if stored is not None:
        assert all(entry.holders == 0 for entry in stored._entries)
        assert stored.snapshot_bytes == sum(entry.snapshot.num_bytes for entry in stored._entries)
        stored.clear()
        assert (stored.num_bytes, len(stored), stored._roots, cache.pool.num_used) == (0, 0, {}, 0)


def prompt_of(length: int) -> list[int]:
    """Prompts of different lengths have no block in common."""
    return [length % 97, *IDS[length % 50 : length % 50 + length - 1]]


def stats(llm: LLM) -> Any:
    assert llm.disk_cache is not None
    return llm.disk_cache.stats


def open_llm(model: Transformer, folder: Path, window: str = "full", **options: Any) -> LLM:
    return LLM(model, cache_dir=folder, cache_window=window, **options)


def step_until_it_begins(llm: LLM, request: Request) -> None:
    while request.slot < 0:
        llm.core.step()
