"""Interface between the model's definition and its computation: a backend runs layers and reads streams out.

`ReferenceBackend` calls the modules themselves, operation by operation, with gradients. `native_backend.py` runs a
frozen model on the fused kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from dsv4.cache import Cache
from dsv4.config import ModelConfig
from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.kernels.mhc import hc_head
from dsv4.kernels.precision import current, precision
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import ForwardContext, MTPBlock
from dsv4.model.choices import ChoiceNotes, noting
from dsv4.model.linear import Linear, linear_fp32
from dsv4.model.norm import RMSNorm

# Name of an optional attribute of a model: the ExpertMemory (checkpoint/expert_memory.py) that limits its experts.
EXPERT_MEMORY = "expert_memory"


class Backend(Protocol):
    """Computes a model's layers and logits. `depth`: number of an MTP block, or None for the main model.

    The caller checks the batch against the cache beforehand and advances the cache's lengths afterwards.
    """

    @property
    def name(self) -> str:
        """ "reference" or "native"."""
        ...

    def run(self, batch: RaggedBatch, cache: Cache | None, aux: AuxLosses | None = None) -> Tensor:
        """Streams [T, hc_mult, d] after the main layers; appends to the cache rows `batch.slots`."""
        ...

    def run_mtp(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        next_token_ids: Tensor,
        streams: Tensor,
        depth: int,
        aux: AuxLosses | None = None,
    ) -> Tensor:
        """Streams of an MTP block, from the main model's streams [T, hc_mult, d] and the next token ids [T]."""
        ...

    def read_out(self, streams: Tensor, depth: int | None = None) -> Tensor:
        """Logits fp32 [n, vocab] of streams [n, hc_mult, d]."""
        ...

    def head_input(self, streams: Tensor, depth: int | None = None) -> Tensor:
        """Hidden states fp32 [n, d] that the head multiplies, of streams [n, hc_mult, d]."""
        ...

    def cross_entropy(self, streams: Tensor, targets: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        """(summed -log p of the tokens `targets` [n], likeliest tokens [n]) of streams [n, hc_mult, d]."""
        ...

    def next_token_logits(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        rows: np.ndarray,
        keep_streams: bool = False,
        notes: ChoiceNotes | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Same bits as `read_out(run(batch, cache)[rows])`, rows int64 [n], ascending; and, if kept, run's streams.

        `notes` get what the layers choose.
        """
        ...


class Definition(Protocol):
    """Modules of the model that a backend computes, as in `dsv4.model.transformer.Transformer`."""

    config: ModelConfig
    numerics: str
    embed: nn.Embedding
    layers: nn.ModuleList
    norm: RMSNorm
    head: Linear
    hc_head_fn: nn.Parameter
    hc_head_base: nn.Parameter
    hc_head_scale: nn.Parameter
    mtp: nn.ModuleList

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


class ReferenceBackend:
    """The modules' own forward: the definition, on any device, in any dtype, with gradients and auxiliary losses."""

    name = "reference"

    def __init__(self, model: Definition) -> None:
        self.model = model

    def run(
        self, batch: RaggedBatch, cache: Cache | None, aux: AuxLosses | None = None, streams: Tensor | None = None
    ) -> Tensor:
        """As in Backend; `streams` are those of an earlier pipeline stage, in place of the embedding's."""
        model = self.model
        ctx = ForwardContext(model.config, batch, cache, aux, model.device)
        x = streams
        if x is None:
            x = model.embed(ctx.token_ids).unsqueeze(1).expand(-1, model.config.hc_mult, -1)
        with self._precision():
            for layer in model.layers:
                x = layer(x, ctx)
        return x

    def _precision(self) -> AbstractContextManager[None]:
        """Precision of the model's numerics, unless training has set one."""
        rounds = self.model.numerics == "bf16" and current() == "fp32"
        return precision("bf16") if rounds else nullcontext()

    def run_mtp(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        next_token_ids: Tensor,
        streams: Tensor,
        depth: int,
        aux: AuxLosses | None = None,
    ) -> Tensor:
        model = self.model
        ctx = ForwardContext(model.config, batch, cache, aux, model.device)
        ctx.token_ids = next_token_ids
        block = cast(MTPBlock, model.mtp[depth])
        with self._precision():
            return block(block.fuse(model.embed(next_token_ids), streams), ctx)

    def read_out(self, streams: Tensor, depth: int | None = None) -> Tensor:
        return linear_fp32(self.head_input(streams, depth), self.model.head.matrix)

    def cross_entropy(self, streams: Tensor, targets: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        return cross_entropy(self.head_input(streams, depth), self.model.head.matrix, targets)

    def head_input(self, streams: Tensor, depth: int | None = None) -> Tensor:
        model = self.model
        site = model if depth is None else cast(MTPBlock, model.mtp[depth])
        x = hc_head(streams, site.hc_head_fn, site.hc_head_scale, site.hc_head_base, model.config)
        return site.norm(x.float())

    def next_token_logits(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        rows: np.ndarray,
        keep_streams: bool = False,
        notes: ChoiceNotes | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        with nullcontext() if notes is None else noting(self.model.config, self.model.layers, notes):
            streams = self.run(batch, cache)
        read = streams
        if len(rows) < batch.num_tokens:
            read = streams[torch.from_numpy(rows).to(streams.device)]
        return self.read_out(read), streams if keep_streams else None
