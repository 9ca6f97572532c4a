"""Inference through the native kernels: all layers of a frozen model in one call.

The kernels read the parameters' memory directly. They see values changed in place, but not a replaced tensor until
`model.refresh()` rebuilds the backend. Under DSV4_CHECK=1 a replaced tensor is an error. In bf16 numerics fp32 weights
of the layers' products are rounded copies, made by `freeze()` and `refresh()`.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dsv4 import checks
from dsv4.cache import Cache
from dsv4.kernels import backends, cpu
from dsv4.kernels.mhc import too_many_streams
from dsv4.kernels.precision import stored_bf16
from dsv4.kernels.stored import StoredStack, StoredTensor
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.backend import EXPERT_MEMORY, Backend, Definition, ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.choices import ChoiceNotes
from dsv4.model.lora import is_adapter
from dsv4.model.moe import expert_loads
from dsv4.model.parameters import is_layer_product, module_name
from dsv4.model.rope import inverse_frequencies
from dsv4.model.stacks import has_stored_experts, named_tensors, native_tensors
from dsv4.notices import warn_once

SIZES = (
    "hidden_size", "vocab_size", "num_hidden_layers", "hc_mult", "hc_sinkhorn_iters", "num_attention_heads", "head_dim",
    "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "rms_norm_eps", "hc_eps",
    "routed_scaling_factor", "swiglu_limit",
)  # fmt: skip


class StaleWeightsError(RuntimeError):
    """A tensor of a frozen model was replaced or requires a gradient, and `model.refresh()` was not called."""


def build_backend(model: Definition) -> Backend:
    """Native backend if the kernels support the model, else the reference.

    If the kernels run on this machine but do not support a float32 model on the CPU, this warns once, or raises
    KernelChoiceError under DSV4_KERNELS=native.
    """
    kernels = backends.native_module()
    if kernels is None or model.device.type != "cpu" or model.dtype != torch.float32:
        return ReferenceBackend(weakref.proxy(model))
    obstacle = _obstacle(model)
    if obstacle is not None:
        backends.decline(obstacle)
        return ReferenceBackend(weakref.proxy(model))
    return NativeBackend(kernels, model)


def _obstacle(model: Definition) -> str | None:
    """Reason why the kernels do not support the model, or None. Of a tensor of another dtype they would keep a copy."""
    obstacle = too_many_streams(model.config.hc_mult)
    if obstacle is not None:
        return obstacle
    for name, parameter in cast(nn.Module, model).named_parameters():
        if is_adapter(name):
            return f"{name} is an adapter, which the native kernels of inference take merged into its matrix alone"
        if parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}, the native kernels take torch.float32 in every weight"
    return None


class NativeBackend:
    """Fused kernels on a frozen model's tensors. Calls with gradients or auxiliary losses go to the reference."""

    name = "native"

    def __init__(self, kernels: ModuleType, model: Definition) -> None:
        self.kernels, self.config = kernels, model.config
        self._model: Any = weakref.proxy(model)  # the model holds this backend: a reference cycle would outlive it
        self._reference = ReferenceBackend(self._model)
        self._places = {name: _place(tensor) for name, tensor in named_tensors(model).items()}
        sizes: dict[str, Any] = {name: getattr(self.config, name) for name in SIZES}
        self.handle: Any = kernels.Model(
            sizes | {"quantize": model.numerics == "shipped", "bf16": model.numerics == "bf16"},
            {name: _argument(name, tensor, model.numerics) for name, tensor in native_tensors(model).items()},
            list(self.config.compress_ratios),
            inverse_frequencies(self.config, False).tolist(),
            inverse_frequencies(self.config, True).tolist(),
        )
        self.handle.count_experts(expert_loads(model))
        limit: Any = getattr(model, EXPERT_MEMORY, None) if has_stored_experts(model) else None
        self._limited = limit is not None
        if limit is not None:
            self.handle.limit_experts(limit.residency)

    def run(self, batch: RaggedBatch, cache: Cache | None, aux: AuxLosses | None = None) -> Tensor:
        if aux is not None:
            self._warn_of_reference()
            return self._reference.run(batch, cache, aux)
        config = self.config
        streams = torch.empty(batch.num_tokens, config.hc_mult, config.hidden_size, dtype=torch.float32, device="cpu")
        inputs = self._inputs(batch, cache, batch.token_ids)
        self.kernels.forward(self.handle, *inputs, 0, config.num_hidden_layers, True, _array(streams))
        return streams

    def run_mtp(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        next_token_ids: Tensor,
        streams: Tensor,
        depth: int,
        aux: AuxLosses | None = None,
    ) -> Tensor:
        if aux is not None or _recorded(streams):
            self._warn_of_reference()
            return self._reference.run_mtp(batch, cache, next_token_ids, streams, depth, aux)
        out = streams.detach().clone(memory_format=torch.contiguous_format)
        self.kernels.mtp_forward(self.handle, *self._inputs(batch, cache, next_token_ids), depth, _array(out))
        return out

    def read_out(self, streams: Tensor, depth: int | None = None) -> Tensor:
        if _recorded(streams):
            return self._reference.read_out(streams, depth)
        self._check()
        logits = torch.empty(streams.shape[0], self.config.vocab_size, dtype=torch.float32, device="cpu")
        prefix = "" if depth is None else f"mtp.{depth}."
        self.kernels.head(self.handle, prefix, _array(streams.contiguous()), _array(logits))
        return logits

    def head_input(self, streams: Tensor, depth: int | None = None) -> Tensor:
        return self._reference.head_input(streams, depth)

    def cross_entropy(self, streams: Tensor, targets: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        return self._reference.cross_entropy(streams, targets, depth)

    def next_token_logits(
        self,
        batch: RaggedBatch,
        cache: Cache | None,
        rows: np.ndarray,
        keep_streams: bool = False,
        notes: ChoiceNotes | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        logits = torch.empty(len(rows), config.vocab_size, dtype=torch.float32, device="cpu")
        inputs = self._inputs(batch, cache, batch.token_ids)
        streams = None
        if keep_streams:
            streams = torch.empty(
                batch.num_tokens, config.hc_mult, config.hidden_size, dtype=torch.float32, device="cpu"
            )
        noted = () if notes is None else (notes.experts, notes.entries)
        outputs = (None if tensor is None else _array(tensor) for tensor in (logits, streams, *noted))
        self.kernels.forward_to_logits(self.handle, *inputs, rows, *outputs)
        return logits, streams

    def _inputs(self, batch: RaggedBatch, cache: Cache | None, token_ids: Tensor) -> tuple[Any, ...]:
        """Batch arguments of the kernels: the cache, the ids, then each sequence's length, start and cache row."""
        self._check()
        cpu.follow_torch_threads()
        if cache is None:  # the kernels need a cache: this one lives as long as the call
            cache = cast(Cache, self._model.new_cache(batch.num_seqs, int(batch.lengths.max())))
            batch = replace(batch, slots=np.arange(batch.num_seqs))
            cache.reserve(batch.slots, batch.starts, batch.lengths)
        handle = cache.native_cache(self.kernels).handle
        return handle, _array(token_ids), batch.lengths, batch.starts, batch.slots

    def _warn_of_reference(self) -> None:
        if self._limited:
            warn_once("expert_memory is not kept by calls with auxiliary losses or gradients, which PyTorch computes")

    def _check(self) -> None:
        """StaleWeightsError if a tensor was replaced since the freeze or requires a gradient; only if checks are on."""
        if not checks.enabled():
            return
        tensors = named_tensors(self._model)
        for name in self._places.keys() | tensors.keys():
            tensor = tensors.get(name)
            if tensor is None or self._places.get(name) != _place(tensor):
                change = "was replaced since the model was frozen"
            elif tensor.requires_grad:
                change = "requires a gradient, which a frozen model does not compute"
            else:
                continue
            raise StaleWeightsError(f"{name} {change}: call model.refresh() after a change of tensors")


def _argument(name: str, tensor: Tensor, numerics: str) -> Any:
    """A tensor as the kernels read it: in place, but in bf16 numerics a rounded copy of a layer's fp32 weight."""
    if numerics == "bf16" and not isinstance(tensor, StoredTensor) and is_layer_product(module_name(name)[0]):
        tensor = stored_bf16(tensor.detach())
    return tensor.parts if isinstance(tensor, StoredTensor) else tensor.detach()


def _recorded(streams: Tensor) -> bool:
    """True if autograd needs a gradient through `streams`."""
    return torch.is_grad_enabled() and streams.requires_grad


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array, which is faster to pass to the kernels than a tensor."""
    return tensor.detach().numpy()


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Memory that the kernels read for a tensor, and its layout there."""
    if isinstance(tensor, StoredStack):
        return tuple(map(_place, tensor.matrices))
    if isinstance(tensor, StoredTensor):
        return _place(tensor.codes), _place(tensor.scales) if tensor.scales is not None else None, tensor.kind
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
