"""Inference through the native kernels: all layers of a frozen model in one call.

The kernels read the parameters where they lie. A change of values in place is seen; a tensor put in another's place is
not, until `model.refresh()` builds the backend anew. Under DSV4_CHECK=1 such a tensor is an error.
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
from dsv4.kernels import backends, cpu
from dsv4.kernels.mhc import MOST_STREAMS
from dsv4.kernels.stored import StoredStack, StoredTensor
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.backend import Backend, Definition, ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import MTPBlock
from dsv4.model.cache import Cache
from dsv4.model.native_cache import NativeCache
from dsv4.model.rope import inverse_frequencies
from dsv4.model.stacks import named_tensors, native_tensors

SIZES = (
    "hidden_size", "vocab_size", "num_hidden_layers", "hc_mult", "hc_sinkhorn_iters", "num_attention_heads", "head_dim",
    "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "rms_norm_eps", "hc_eps",
    "routed_scaling_factor", "swiglu_limit",
)  # fmt: skip


class StaleWeightsError(RuntimeError):
    """A frozen model has a tensor that its backend does not know: `model.refresh()` was not called."""


def build_backend(model: Definition) -> Backend:
    """The native kernels where they take the model, else the reference.

    Where they run on this machine but do not take a float32 model on the CPU, that is said once, or a KernelChoiceError
    where DSV4_KERNELS=native asks for them.
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
    """A property of the model that the kernels do not take, in words: of other dtypes they would keep a copy."""
    if model.config.hc_mult > MOST_STREAMS:
        return f"the model has {model.config.hc_mult} streams, the native kernels take {MOST_STREAMS}"
    for name, parameter in cast(nn.Module, model).named_parameters():
        if parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}, the native kernels take torch.float32 in every weight"
    return None


class NativeBackend:
    """A frozen model's tensors as the kernels see them. Gradients and auxiliary losses are the reference's."""

    name = "native"

    def __init__(self, kernels: ModuleType, model: Definition) -> None:
        self.kernels, self.config = kernels, model.config
        self._model: Any = weakref.proxy(model)  # the model holds this: a cycle would outlive it
        self._reference = ReferenceBackend(self._model)
        self._places = {name: _place(tensor) for name, tensor in named_tensors(model).items()}
        sizes: dict[str, Any] = {name: getattr(self.config, name) for name in SIZES}
        self.handle: Any = kernels.Model(
            sizes | {"quantize": model.numerics == "shipped"},
            {name: t.parts if isinstance(t, StoredTensor) else t.detach() for name, t in native_tensors(model).items()},
            list(self.config.compress_ratios),
            inverse_frequencies(self.config, False).tolist(),
            inverse_frequencies(self.config, True).tolist(),
        )

    def run(self, batch: RaggedBatch, cache: Cache | None, aux: AuxLosses | None = None) -> Tensor:
        if aux is not None:
            return self._reference.run(batch, cache, aux)
        return self._layers(batch, cache, batch.token_ids, range(self.config.num_hidden_layers), None)

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
            return self._reference.run_mtp(batch, cache, next_token_ids, streams, depth, aux)
        block, index = cast(MTPBlock, self._model.mtp[depth]), self.config.num_hidden_layers + depth
        fused = block.fuse(self._model.embed(next_token_ids), streams)
        return self._layers(batch, cache, next_token_ids, range(index, index + 1), fused)

    def read_out(self, streams: Tensor, depth: int | None = None) -> Tensor:
        if _recorded(streams):
            return self._reference.read_out(streams, depth)
        self._check()
        logits = torch.empty(streams.shape[0], self.config.vocab_size, dtype=torch.float32, device="cpu")
        prefix = "" if depth is None else f"mtp.{depth}."
        self.kernels.head(self.handle, prefix, _array(streams.contiguous()), _array(logits))
        return logits

    def next_token_logits(self, batch: RaggedBatch, cache: Cache | None, rows: np.ndarray) -> Tensor:
        logits = torch.empty(len(rows), self.config.vocab_size, dtype=torch.float32, device="cpu")
        inputs = self._inputs(batch, cache, batch.token_ids)
        self.kernels.forward_to_logits(self.handle, *inputs, rows, _array(logits))
        return logits

    def _layers(
        self, batch: RaggedBatch, cache: Cache | None, token_ids: Tensor, layers: range, streams: Tensor | None
    ) -> Tensor:
        """Streams [T, hc_mult, d] after `layers`, from `streams`, which stay as they are, or from the embedding."""
        config = self.config
        out = torch.empty(batch.num_tokens, config.hc_mult, config.hidden_size, dtype=torch.float32, device="cpu")
        if streams is not None:
            out.copy_(streams.detach())
        inputs = self._inputs(batch, cache, token_ids)
        self.kernels.forward(self.handle, *inputs, layers.start, layers.stop, streams is None, _array(out))
        return out

    def _inputs(self, batch: RaggedBatch, cache: Cache | None, token_ids: Tensor) -> tuple[Any, ...]:
        """A batch as the kernels take it: the cache, the ids, then each sequence's length, start and row."""
        self._check()
        cpu.follow_torch_threads()
        if cache is None:  # the kernels need one: it lives as long as the call
            cache = cast(Cache, self._model.new_cache(batch.num_seqs, int(batch.lengths.max())))
            batch = replace(batch, starts=np.zeros_like(batch.starts), slots=np.arange(batch.num_seqs))
        handle = NativeCache.of(cache, self.kernels).current()
        return handle, _array(token_ids), batch.lengths, batch.starts, batch.slots

    def _check(self) -> None:
        """StaleWeightsError at a tensor that has moved since, or wants a gradient; only where checks are enabled."""
        if not checks.enabled():
            return
        tensors = named_tensors(self._model)
        for name in self._places.keys() | tensors.keys():
            tensor = tensors.get(name)
            if tensor is None or self._places.get(name) != _place(tensor):
                change = "is another tensor than when the model was frozen"
            elif tensor.requires_grad:
                change = "requires a gradient, which a frozen model does not compute"
            else:
                continue
            raise StaleWeightsError(f"{name} {change}: call model.refresh() after a change of tensors")


def _recorded(streams: Tensor) -> bool:
    """True if autograd needs a gradient through `streams`."""
    return torch.is_grad_enabled() and streams.requires_grad


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array, which takes less time to hand over than a tensor."""
    return tensor.detach().numpy()


def _place(tensor: Tensor) -> tuple[object, ...]:
    if isinstance(tensor, StoredStack):
        return tuple(map(_place, tensor.matrices))
    held = tensor.codes if isinstance(tensor, StoredTensor) else tensor
    return held.data_ptr(), held.stride(0), held.dtype
