"""The model: embedding, blocks, read-out, MTP blocks. Parameter names are the official checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv4.cache import Cache
from dsv4.cache.formats import cache_dtype
from dsv4.config import WINDOW, ModelConfig
from dsv4.kernels.stored import StoredWeight
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.backend import Backend, ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import Block, MTPBlock, hc_parameters
from dsv4.model.choices import ChoiceNotes
from dsv4.model.initialization import init_weights
from dsv4.model.linear import Linear
from dsv4.model.moe import Gate
from dsv4.model.native_backend import build_backend
from dsv4.model.norm import RMSNorm

NUMERICS = ("float", "bf16", "shipped")


class Transformer(nn.Module):
    """DeepSeek V4. numerics: "float" (no fake quantization), "bf16" (layers and experts multiply BF16 numbers, as
    training in bf16 does: kernels/precision.py) or "shipped" (FP8 KV and activations, FP4 indexer)."""

    def __init__(self, config: ModelConfig, numerics: str = "float") -> None:
        super().__init__()
        if numerics not in NUMERICS:
            raise ValueError(f"numerics {numerics!r}: allowed are {', '.join(NUMERICS)}")
        if config.sliding_window != WINDOW:
            raise ValueError(
                f"sliding_window {config.sliding_window}: this implementation has windows of {WINDOW} tokens"
            )
        quantize = numerics == "shipped"
        width = config.index_head_dim
        if quantize and config.has_indexer and width & (width - 1):
            raise ValueError(
                f"index_head_dim {width}: shipped numerics rotate it by Hadamard, which needs a power of two"
            )
        self.config, self.numerics = config, numerics
        d, s = config.hidden_size, config.hc_mult
        self.embed = nn.Embedding(config.vocab_size, d, _weight=torch.empty(config.vocab_size, d))
        self.layers = nn.ModuleList(Block(config, i, f"layers.{i}", quantize) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.head = Linear(d, config.vocab_size)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_parameters(config, s, 1)
        self.mtp = nn.ModuleList(MTPBlock(config, i, quantize) for i in range(config.num_nextn_predict_layers))
        self._frozen: Backend | None = None

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize all parameters for training from scratch."""
        init_weights(self, self.config, generator)

    @property
    def backend(self) -> Backend:
        """Backend of this model: native kernels if it is frozen and they support it, else the reference."""
        return self._frozen or ReferenceBackend(self)

    @property
    def frozen(self) -> bool:
        """True from `freeze()` until `requires_grad_()` or `train()` thaws the model."""
        return self._frozen is not None

    def freeze(self) -> Transformer:
        """Prepare for inference: no parameter takes a gradient, and the fastest backend is built. Returns self.

        After replacing a parameter's tensor, by `.data =` or a new module, call `refresh()`; writing into a parameter
        needs no refresh. Conversions of the whole model refresh by themselves, those of a submodule, as in
        `model.layers[0].double()`, do not. With DSV4_CHECK=1 a forgotten refresh is a StaleWeightsError.
        `requires_grad_()` and `train()` thaw the model.
        """
        super().requires_grad_(False)
        super().train(False)
        self._frozen = build_backend(self)
        return self

    def refresh(self) -> Transformer:
        """Rebuild a frozen model's backend after tensors were replaced. Returns self. Thaws the model if that fails."""
        if self._frozen is not None:
            self._frozen = None  # not the backend of the old tensors, should `build_backend` raise
            self._frozen = build_backend(self)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Transformer:
        """As in nn.Module, except that router biases, which move by rule, never take a gradient.

        True thaws the model and widens stored weights, which cannot take a gradient.
        """
        if requires_grad:
            self._frozen = None
            self.widen()
        super().requires_grad_(requires_grad)
        for module in self.modules():
            if isinstance(module, Gate) and module.bias is not None:
                module.bias.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> Transformer:
        """As in nn.Module. True thaws the model."""
        if mode:
            self._frozen = None
        return super().train(mode)

    def widen(self) -> Transformer:
        """Turn stored weights (kernels/stored.py) into float32 parameters. Returns self."""
        _widen(self)
        return self.refresh()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in nn.Module; refreshes the backend, after an error too: the tensors before it are loaded."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Hook of nn.Module for all conversions and moves of tensors; refreshes the backend, after an error too.

        Widens stored weights, except for a conversion that changes nothing, such as `float()` on a float32 model.
        """
        try:
            if not _keeps(fn, self.device):
                _widen(self)
            super()._apply(fn, recurse)
        finally:
            self.refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or pickle, without the backend, which holds addresses of this model's tensors."""
        return self.__dict__ | {"_frozen": self.frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        frozen = state["_frozen"]
        super().__setstate__(state | {"_frozen": None})
        if frozen:
            self.freeze()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def new_cache(
        self,
        batch_size: int = 1,
        max_tokens: int = 4096,
        max_pages: int | None = None,
        kv_cache_dtype: str = "auto",
    ) -> Cache:
        """An empty cache: `batch_size` sequences of up to `max_tokens` tokens. On CPUs it takes memory as it fills.

        `max_pages`: pages of all sequences together; default: enough for full ones. `kv_cache_dtype`: of keys and
        entries, one of KV_CACHE_DTYPES; "auto": in shipped numerics as the published model stores them, which loses
        nothing; in float numerics the model's dtype.
        """
        dtype = cache_dtype(kv_cache_dtype, self.numerics, self.dtype)
        return Cache(self.config, batch_size, max_tokens, self.device, dtype, max_pages)

    def forward_ragged(self, batch: RaggedBatch, cache: Cache | None = None, aux: AuxLosses | None = None) -> Tensor:
        """Streams [T, hc_mult, d] after the last main layer. With a cache, appends to its rows `batch.slots`.

        Sequence i must start where its cache row ends, without a cache at 0, and no row may occur twice; ValueError
        otherwise, before anything is written.
        """
        _reserve(batch, cache, self.numerics)
        streams = self.backend.run(batch, cache, aux)
        if cache is not None:
            cache.advance(batch.slots, batch.lengths)
        return streams

    def run_stage(self, batch: RaggedBatch, streams: Tensor | None, aux: AuxLosses | None = None) -> Tensor:
        """Streams [T, hc_mult, d] after the layers that this model has, as one stage of a pipeline in training.

        `streams` are those of the stage before; None: the embedding's.
        """
        _check_starts(batch)
        return ReferenceBackend(self).run(batch, None, aux, streams)

    def next_token_logits(
        self,
        batch: RaggedBatch,
        cache: Cache | None = None,
        rows: np.ndarray | None = None,
        notes: ChoiceNotes | None = None,
    ) -> Tensor:
        """Logits fp32 [n, vocab] after the batch's tokens `rows`, int64 [n] ascending; None: after every token.

        Same bits as `logits(forward_ragged(batch, cache)[rows])`, without keeping all streams: an engine's step.
        `notes` get the experts and entries that each token of the batch runs and reads.
        ValueError, before anything is written, as in `forward_ragged`, and if rows do not ascend or are out of range.
        """
        return self._read_rows(batch, cache, rows, keep_streams=False, notes=notes)[0]

    def next_token_logits_and_streams(
        self, batch: RaggedBatch, cache: Cache | None, rows: np.ndarray, notes: ChoiceNotes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Same bits as `next_token_logits`, and the streams [T, hc_mult, d] of all tokens, for the MTP block."""
        logits, streams = self._read_rows(batch, cache, rows, keep_streams=True, notes=notes)
        assert streams is not None
        return logits, streams

    def _read_rows(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        rows: np.ndarray | None,
        keep_streams: bool,
        notes: ChoiceNotes | None,
    ) -> tuple[Tensor, Tensor | None]:
        before = -1
        for i, row in enumerate(() if rows is None else rows.tolist()):
            if not before < row < batch.num_tokens:
                allowed = f"0 to {batch.num_tokens - 1}, each more than the one before"
                raise ValueError(f"rows[{i}] is {row}: allowed are {allowed}")
            before = row
        _reserve(batch, cache, self.numerics)
        rows = np.arange(batch.num_tokens) if rows is None else rows
        logits, streams = self.backend.next_token_logits(batch, cache, rows, keep_streams, notes)
        if cache is not None:
            cache.advance(batch.slots, batch.lengths)
        return logits, streams

    def logits(self, streams: Tensor) -> Tensor:
        """Next-token logits, fp32 [n, vocab], of streams [n, hc_mult, d]."""
        return self.backend.read_out(streams)

    def head_input(self, streams: Tensor) -> Tensor:
        """Hidden states fp32 [n, d] of streams [n, hc_mult, d]: after read-out and final norm, before the head."""
        return self.backend.head_input(streams)

    def cross_entropy(self, streams: Tensor, targets: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        """(-log p of the tokens `targets` int64 [n], summed; likeliest tokens int64 [n]) of streams [n, hc_mult, d].

        On the native kernels without the logits of all rows in memory. depth: of the MTP block whose streams they are.
        """
        return self.backend.cross_entropy(streams, targets, depth)

    def mtp_forward(
        self,
        streams: Tensor,
        next_token_ids: Tensor,
        batch: RaggedBatch,
        cache: Cache | None = None,
        aux: AuxLosses | None = None,
        depth: int = 0,
    ) -> Tensor:
        """Streams of the MTP block: main streams at t and the id at t + 1 [T] -> streams that predict t + 2.

        With a cache, `batch` is the one just run through the main layers (its starts are used, not cache.lengths);
        without one, ValueError unless it starts at 0.
        """
        if cache is None:
            _check_starts(batch)
        else:
            cache.check_slots(batch.slots.tolist())
        return self.backend.run_mtp(batch, cache, next_token_ids, streams, depth, aux)

    def mtp_logits(self, streams: Tensor, depth: int = 0) -> Tensor:
        """Logits for t + 2, fp32 [n, vocab], of MTP streams [n, hc_mult, d]; the head is the main model's."""
        return self.backend.read_out(streams, depth)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Rectangular call: input_ids int64 [B, S], without padding -> logits fp32 [B, S, vocab].

        With a cache, row b continues cache row b; any split of a sequence into calls gives the same logits.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be [batch, at least one token], got {tuple(input_ids.shape)}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high}: allowed are 0 to {self.config.vocab_size - 1}")
        if cache is not None and input_ids.shape[0] != cache.batch_size:
            raise ValueError(f"input_ids has {input_ids.shape[0]} rows, the cache {cache.batch_size}")
        starts = cache.lengths if cache is not None else None
        batch = RaggedBatch.pack(input_ids.tolist(), starts=starts, device=self.device)
        return self.next_token_logits(batch, cache).view(*input_ids.shape, -1)


def _widen(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, StoredWeight):
                setattr(module, name, nn.Parameter(parameter.widen(), requires_grad=False))


def _keeps(fn: Any, device: torch.device) -> bool:
    """True if `fn` returns float32 tensors on the device as they are, and does not move them to shared memory."""
    probe = torch.zeros(1, dtype=torch.float32, device=device)
    shared = probe.is_shared()
    return fn(probe) is probe and probe.is_shared() == shared


def _reserve(batch: RaggedBatch, cache: Cache | None, numerics: str) -> None:
    """Check the batch and make room for it in the cache, if there is one."""
    if cache is None:
        _check_starts(batch)
    elif cache.dtype == "shipped" and numerics != "shipped":
        raise ValueError(
            f"a cache in the published formats holds keys of shipped numerics alone, not of {numerics} ones"
        )
    else:
        cache.reserve(batch.slots, batch.starts, batch.lengths)


def _check_starts(batch: RaggedBatch) -> None:
    """ValueError unless every sequence starts at 0, as without a cache it must, the first of a part apart."""
    for i, start in enumerate(batch.starts.tolist()):
        if start != 0 and (batch.part is None or i > 0):
            raise ValueError(f"sequence {i} of the batch starts at {start}: a batch without a cache starts at 0")
