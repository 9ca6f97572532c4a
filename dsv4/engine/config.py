"""EngineConfig: every option of the engine. The keywords of `LLM`, `serve` and the flags of commands follow. No torch.

A field that is added here is a keyword and, in the commands that it names, a flag; `llm.engine_config` carries it to
whatever reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4.options import check_options, option

if TYPE_CHECKING:
    from pathlib import Path

    import torch

DTYPES = ("auto", "bfloat16", "float32")
MAX_DRAFTS = 7  # with the token before them they fill the smallest ring of the cache, 8 rows of a CSA compressor


MODEL, CACHE, ENGINE = "model", "cache", "engine"  # groups of flags
CACHE_WINDOWS = "full, periodic:N (N tokens, at least 1), zero"


@dataclass(frozen=True)
class WindowPolicy:
    """One of the report's three: `period` 0 keeps every state that memory keeps, None none."""

    period: int | None

    @classmethod
    def parse(cls, text: str) -> WindowPolicy:
        """Policy by its name; ValueError for another."""
        if text in ("full", "zero"):
            return cls(0 if text == "full" else None)
        match = re.fullmatch(r"periodic:([1-9][0-9]{0,11})", text)
        if match is None:
            raise ValueError(f"cache_window is {text!r}; allowed: {CACHE_WINDOWS}")
        return cls(int(match[1]))

    @property
    def replays(self) -> bool:
        """True if a hit computes the state anew from stored entries."""
        return self.period is None

    def keeps_state(self, length: int) -> bool:
        """True if the state after `length` tokens goes to the disk."""
        return self.period is not None and (self.period == 0 or length % self.period == 0)

    def is_place(self, computed: int) -> bool:
        """True at the lengths of `next_place`."""
        return bool(self.period) and computed % self.period == 0

    def next_place(self, computed: int) -> int | None:
        """The next length after `computed` tokens that this policy adds to the places of stored states."""
        return computed - computed % self.period + self.period if self.period else None


@dataclass(frozen=True)
class EngineConfig:
    """Options of loading a model, of the requests that run and wait, of a step and of stored prefixes.

    ValueError names a value that is not allowed. Every running request must be able to decode in one step, so that
    max_num_batched_tokens is at least max_num_seqs.
    """

    max_num_seqs: int = option(
        8,
        "requests computed at once (default: %(default)s)",
        unit="requests",
        minimum=1,
        metavar="N",
        group=ENGINE,
    )
    max_num_waiting: int = option(
        256,
        "requests that may wait for their turn; more are told to come again (default: %(default)s)",
        unit="requests",
        minimum=1,
        metavar="N",
        flag="--max-waiting",
        group=ENGINE,
    )
    max_queue_seconds: float = option(
        600.0,
        "seconds that a request may wait before any of it is computed; then it is told to come again; 0: no limit "
        "(default: %(default)g)",
        unit="seconds",
        minimum=0,
        metavar="S",
        flag="--queue-seconds",
        group=ENGINE,
    )
    max_waiting_tokens: int = option(
        1 << 22, "tokens of all prompts that wait, about 50 bytes each", unit="tokens", minimum=1, commands=()
    )
    max_model_len: int | None = option(
        None,
        "tokens that a request may hold, prompt included (default: the model's limit, or what memory holds)",
        unit="tokens",
        minimum=2,
        metavar="N",
        group=ENGINE,
    )
    max_num_batched_tokens: int = option(1024, "tokens computed in one step", unit="tokens", minimum=1, commands=())
    max_num_partial_prefills: int | None = option(
        None, "prompts read in part at a time (default: half of max_num_seqs)", unit="prompts", commands=()
    )
    time_slice: int = option(
        128, "steps after which a request gives its place to one that waits", unit="steps", minimum=1, commands=()
    )
    enable_prefix_caching: bool = option(
        True,
        "compute every prompt from its first token on",
        flag="--no-prefix-caching",
        group=CACHE,
    )
    prefix_cache_bytes: int = option(
        1 << 30,
        "memory of prefixes for later requests (default: %(default)s)",
        unit="bytes",
        minimum=0,
        metavar="SIZE",
        group=CACHE,
    )
    snapshot_interval: int = option(
        4096, "tokens between two states of a long prompt that are stored", unit="tokens", minimum=1, commands=()
    )
    cache_dir: str | Path | None = option(  # noqa: RUF009  # makes a field
        None,
        "folder for stored prefixes that outlive the process, shared by processes; it is made where there is none, and"
        " one that cannot be is an error at the start",
        commands=("serve", "chat", "generate"),
        metavar="DIR",
        group=CACHE,
    )
    cache_window: str = option(
        "full",
        "states kept there: full (every one), periodic:N (every N tokens), zero (none: the windows of all layers are "
        "computed again) (default: %(default)s)",
        commands=("serve", "chat", "generate"),
        metavar="POLICY",
        group=CACHE,
    )
    cache_bytes: int | None = option(
        None,
        "bytes of that folder, such as 4G; least recently used prefixes make room (default: no limit)",
        unit="bytes",
        minimum=0,
        commands=("serve", "chat", "generate"),
        metavar="SIZE",
        group=CACHE,
    )
    speculate: int = option(
        0,
        "tokens per step that the MTP block drafts at most; the output stays the same (default: %(default)s)",
        unit="draft tokens",
        minimum=0,
        commands=("serve", "chat", "generate"),
        metavar="K",
        group=ENGINE,
    )
    enable_return_routed_experts: bool = option(
        False, "give the experts of every token with an output, for replay in training", commands=()
    )
    enable_return_indexer_topk: bool = option(
        False, "give the compressed entries that every token reads with an output", commands=()
    )
    num_pages: int | None = option(
        None,
        "pages of 128 tokens that all requests share (default: as many as full ones need, or as memory holds)",
        unit="pages",
        minimum=1,
        metavar="N",
        group=CACHE,
    )
    device: str = option("cpu", "cpu or cuda (default: %(default)s)", group=MODEL)
    dtype: str | torch.dtype = option(  # noqa: RUF009  # makes a field, as dataclasses.field does
        "auto",
        "of the matrices (default: %(default)s, float32 on the CPU, bfloat16 on a GPU)",
        choices=DTYPES,
        group=MODEL,
    )
    kv_cache_dtype: str = option(
        "auto",
        "of the keys and entries of the cache (default: %(default)s, in shipped numerics FP8 and FP4 as the published"
        " model stores them, else the dtype)",
        choices=DTYPES,
        group=MODEL,
    )
    numerics: str = option(
        "float",
        "float: as the weights are; bf16: weights and activations of layers and experts rounded to BF16, as training"
        " in bf16 does; shipped: activations and cache rounded as the published model does"
        " (default: %(default)s)",
        choices=("float", "bf16", "shipped"),
        commands=("serve", "chat", "generate"),
        group=MODEL,
    )
    check_values: bool = option(
        True,
        "load without looking for NaN and infinity in the weights, which reads them all",
        flag="--skip-weight-check",
        commands=("serve", "chat", "generate"),
        group=MODEL,
    )
    expert_memory: int | None = option(
        None,
        "routed experts kept in memory, at most; the others are read from the files when they are needed"
        " (default: as the system has room)",
        unit="bytes",
        minimum=1,
        commands=("serve", "chat", "generate"),
        metavar="SIZE",
        group=MODEL,
    )
    check_memory: bool = option(
        True, "load a model that does not seem to fit into memory", flag="--no-memory-check", group=MODEL
    )
    revision: str | None = option(
        None,
        "branch, tag or commit of a model by name (default: its main branch)",
        commands=("serve", "chat", "generate", "inspect", "convert", "verify"),
        metavar="NAME",
        group=MODEL,
    )

    def __post_init__(self) -> None:
        check_options(self)
        WindowPolicy.parse(self.cache_window)
        if self.cache_dir == "":
            raise ValueError("cache_dir is ''; allowed: a folder, which is made where there is none, or None")
        if self.cache_dir is not None and not self.enable_prefix_caching:
            raise ValueError(
                f"cache_dir is {str(self.cache_dir)!r} and enable_prefix_caching False; allowed is one of them"
            )
        for name in ("enable_return_routed_experts", "enable_return_indexer_topk"):
            if getattr(self, name) and self.cache_dir is not None:
                raise ValueError(
                    f"{name} is True and cache_dir {str(self.cache_dir)!r}, where prefixes are without their choices;"
                    " allowed is one of them"
                )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least max_num_seqs"
                f" ({self.max_num_seqs}), so that every running request can decode in one step"
            )
        if self.speculate > MAX_DRAFTS:
            raise ValueError(f"speculate is {self.speculate}; allowed: [0, {MAX_DRAFTS}] draft tokens")
        if not 1 <= self.partial_prefills <= self.max_num_seqs:
            raise ValueError(
                f"max_num_partial_prefills is {self.max_num_partial_prefills}; allowed: [1, {self.max_num_seqs}]"
                " (max_num_seqs)"
            )

    @property
    def partial_prefills(self) -> int:
        """Requests whose prompts may be read in part at a time."""
        if self.max_num_partial_prefills is None:
            return max(1, self.max_num_seqs // 2)
        return self.max_num_partial_prefills
