"""Memory capacity check: computes from the config, before loading, if a model fits into memory. Arithmetic only.

Weights are mapped (as stored: the system pages them in from the file, again and again if memory is short) or copied
(widened to the model's dtype). The cache holds a fixed state per request, allocated at the start, and pages that grow
with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from dsv4.analysis.inventory import StorageLayout, tensor_inventory
from dsv4.analysis.kv import KvFormat, entry_bytes, index_key_bytes, state_bytes
from dsv4.config import COMPRESSION_KINDS, PAGE_TOKENS, WINDOW, ModelConfig
from dsv4.engine.machine import Memory

MAPPED_TYPES = ("BF16", "F8_E4M3", "I8")  # matrix types that the native kernels read as stored


class CapacityError(ValueError):
    """The model needs more memory than is available."""


@dataclass(frozen=True)
class LoadPlan:
    """Settings for loading and serving a folder that decide its memory."""

    config: ModelConfig
    layout: StorageLayout  # of the folder's tensors
    keeps_stored: bool  # True if the native kernels read the matrices in place
    itemsize: int  # bytes per element of the widened matrices
    max_num_seqs: int
    max_model_len: int
    expert_memory: int | None = None  # bytes of routed experts kept in memory; None: as the system has room
    speculates: bool = False  # True if the streams that the MTP block reads are kept
    kv_format: KvFormat | None = None  # of the cache; None: the dtype of widened matrices

    @property
    def cache_format(self) -> KvFormat:
        return self.kv_format or ("bf16" if self.itemsize == 2 else "fp32")


@dataclass(frozen=True)
class Need:
    """Memory that a plan takes, in bytes except `pages` and `rows`."""

    mapped: int  # weights in mapped files that are to be in memory
    copied: int  # weights in the process's own memory
    state: int  # of all request slots, independent of their length
    page: int  # per PAGE_TOKENS tokens of one request, over all layers
    pages: int  # per request of max_model_len tokens
    rows: int  # concurrent requests (max_num_seqs)
    experts: int = 0  # routed experts in mapped files
    expert_memory: int | None = None  # bytes of them kept in memory, which `mapped` counts; None: all

    @property
    def at_start(self) -> int:
        return self.copied + self.state

    @property
    def full_request(self) -> int:
        return self.page * self.pages


def need_of(plan: LoadPlan) -> Need:
    """Memory of a plan, summed over the tensors as `load_model` and `Cache` allocate them."""
    mapped = copied = experts = 0
    types = {spec.name: spec.dtype for spec in tensor_inventory(plan.config, plan.layout)}
    stored = {spec.name: spec.num_bytes for spec in tensor_inventory(plan.config, plan.layout)}
    for spec in tensor_inventory(plan.config, "bf16"):
        matrix = spec.dtype == "BF16" and len(spec.shape) == 2
        if matrix and plan.keeps_stored and types[spec.name] in MAPPED_TYPES:
            size = stored[spec.name] + stored.get(spec.name.removesuffix("weight") + "scale", 0)
            mapped += size
            experts += size if spec.component == "routed_experts" else 0
        else:
            copied += prod(spec.shape) * (plan.itemsize if matrix else 8 if spec.dtype == "I64" else 4)
    state, page = cache_bytes_of(plan.config, plan.cache_format)
    if plan.speculates:
        state += kept_stream_bytes(plan.config, plan.itemsize)
    pages = -(-plan.max_model_len // PAGE_TOKENS)
    if plan.expert_memory is not None:
        mapped -= max(0, experts - plan.expert_memory)
    return Need(
        mapped=mapped,
        copied=copied,
        state=state * plan.max_num_seqs,
        page=page,
        pages=pages,
        rows=plan.max_num_seqs,
        experts=experts,
        expert_memory=plan.expert_memory,
    )


def total_need(needs: Sequence[Need]) -> Need:
    """Memory of models that are loaded together. A lone need stays as it is."""
    pages = max(need.pages for need in needs)
    full = sum(need.full_request for need in needs)  # a request of full length in each model
    limits = [need.expert_memory for need in needs if need.expert_memory is not None]
    return Need(
        mapped=sum(need.mapped for need in needs),
        copied=sum(need.copied for need in needs),
        state=sum(need.state for need in needs),
        page=-(-full // pages) if pages else 0,
        pages=pages,
        rows=max(need.rows for need in needs),
        experts=sum(need.experts for need in needs),
        expert_memory=sum(limits) if len(limits) == len(needs) else None,
    )


def cache_bytes_of(config: ModelConfig, kv_format: KvFormat) -> tuple[int, int]:
    """Bytes of (the state per request, a page) over all layers, MTP blocks included."""
    state = page = 0
    entry, key = entry_bytes(config, kv_format), index_key_bytes(config, kv_format)
    for ratio in config.compress_ratios:
        kind = COMPRESSION_KINDS[ratio]
        state += config.sliding_window * entry + state_bytes(config, kind)
        if kind.ratio:
            page += PAGE_TOKENS // ratio * (entry + (key if kind.has_indexer else 0))
    return state, page


def kept_stream_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes per request of the streams that `dsv4.cache.mtp.MTPState` keeps."""
    return WINDOW * config.hc_mult * config.hidden_size * itemsize


def check_fit(name: str, need: Need, memory: Memory, ways_out: list[str]) -> list[str]:
    """Warnings about a slow or later failing setup; CapacityError if the model cannot be loaded at all."""
    have = f"{_gb(memory.available)} of the {_gb(memory.total)} of {memory.owner} are available"
    if need.at_start > memory.available:
        parts = f"weights {_gb(need.copied)}, state of {need.rows} requests {_gb(need.state)}"
        out = "".join(f"\n  - {way}" for way in ways_out)
        raise CapacityError(
            f"{name} needs {_gb(need.at_start)} of memory to start ({parts}), and {have}. Ways out:{out}"
        )
    warnings: list[str] = []
    left = memory.available - need.at_start
    if need.mapped > left:
        warnings.append(f"{name}: {_weights_in_words(need)}, and {have}: {_slow_reads(need, left)}")
    most = need.rows * need.full_request
    if most > left:
        tokens = left // need.page * PAGE_TOKENS if need.page else 0
        warnings.append(
            f"{name}: the cache of {need.rows} requests of {need.pages * PAGE_TOKENS} tokens takes {_gb(most)}, and"
            f" {_gb(left)} are left beside the model, enough for {tokens} tokens together: beyond them requests wait"
        )
    return warnings


def _weights_in_words(need: Need) -> str:
    if need.expert_memory is None:
        return f"the weights are {_gb(need.mapped)} as stored"
    experts = min(need.experts, need.expert_memory)
    return f"the weights take {_gb(need.mapped)} with {_gb(experts)} of experts (expert_memory)"


def _slow_reads(need: Need, left: int) -> str:
    """Warning of mapped weights larger than the memory left for them, with the way out if there is one."""
    others = need.mapped - min(need.experts, need.experts if need.expert_memory is None else need.expert_memory)
    slow = "parts of them will be read from the disk again and again, which is slow"
    if not 0 <= others < left or not need.experts:
        return slow
    return f"{slow}; expert_memory (--expert-memory) of up to {_gb(left - others)} bounds and plans these reads"


def ways_out(plan: LoadPlan, memory: Memory, kernels: str) -> list[str]:
    """Suggestions to make a model fit, the simplest first. `kernels`: the line of `backends.describe`."""
    ways: list[str] = []
    if plan.itemsize > 2 and not plan.keeps_stored:
        half = need_of(replace(plan, itemsize=2)).at_start
        verdict = "fits" if half <= memory.available else "does not fit either"
        ways.append(f"dtype bfloat16 (dsv4 serve --dtype bfloat16) needs {_gb(half)}, which {verdict}")
    one = need_of(replace(plan, max_num_seqs=1)).at_start
    if plan.max_num_seqs > 1 and one <= memory.available:
        ways.append(f"one request at a time (dsv4 serve --max-num-seqs 1) needs {_gb(one)}, which fits")
    if not plan.keeps_stored:
        stored = need_of(replace(plan, keeps_stored=True, itemsize=4))
        ways.append(
            f"native kernels on the CPU in float32 ({kernels}): the weights stay in their files as they are stored,"
            f" {_gb(stored.mapped)}, and {_gb(stored.at_start)} are taken at the start"
        )
    ways.append("a machine with more memory, or a smaller model")
    return ways


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
