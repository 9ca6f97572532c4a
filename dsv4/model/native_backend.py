"""Inference through the native kernels: the same layers as `Block.forward`, one call for all of them.

`Transformer` comes here when the native kernels run, no gradient is wanted (none is recorded, or no parameter takes
one), no auxiliary loss is collected, the weights are fp32 on the CPU, every one, and the streams are at most 16. The
kernels read the parameters where they lie, so that a change in place is seen.
"""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from dsv4.cache import Cache
from dsv4.cache.native import NativeCache
from dsv4.kernels import native
from dsv4.kernels.stored import StoredTensor
from dsv4.model.batch import RaggedBatch
from dsv4.model.rope import inverse_frequencies

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer

SIZES = (
    "hidden_size", "vocab_size", "num_hidden_layers", "hc_mult", "hc_sinkhorn_iters", "num_attention_heads", "head_dim",
    "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "rms_norm_eps", "hc_eps",
    "routed_scaling_factor", "swiglu_limit",
)  # fmt: skip
FEW_TOKENS = 16  # with so few, a forward takes less time than looking at every tensor

MOST_STREAMS = 16  # that the kernels take

# Of parameters, buffers and modules, in any module: one may be a new weight of a model that is used natively.
_registrations = 0


def _count_registration(*registered: object) -> None:
    global _registrations
    _registrations += 1


register_module_parameter_registration_hook(_count_registration)
register_module_buffer_registration_hook(_count_registration)
register_module_module_registration_hook(_count_registration)


def wants_gradient(model: Transformer) -> bool:
    """Whether a forward now would be recorded for a gradient of one of the model's parameters."""
    return torch.is_grad_enabled() and any(
        p.requires_grad for table in _parameter_tables(model) for p in table.values() if p is not None
    )


def _parameter_tables(model: Transformer) -> list[dict[str, Any]]:
    """The modules' own tables of parameters, kept: a walk over a thousand modules would take milliseconds a token."""
    made = model._native
    return made.parameter_tables if made and made.registrations == _registrations else _tables(model)


def _tables(model: Transformer) -> list[dict[str, Any]]:
    return [module._parameters for module in model.modules() if module._parameters]


class NativeForward:
    """A model's tensors as the kernels see them. Made anew when a tensor has moved."""

    def __init__(self, kernels: ModuleType, model: Transformer) -> None:
        self.kernels = kernels
        self._model: Any = weakref.proxy(model)  # the model holds this: a cycle would outlive it
        self.parameter_tables, self.registrations = _tables(model), _registrations
        self._tensors = _tensors(model)
        self._places = _places(self._tensors.values())
        other = (
            "mtp.",
            *(f"layers.{i}." for i in range(1, model.config.num_hidden_layers)),
            *(f"layers.0.ffn.experts.{i}." for i in range(1, model.config.n_routed_experts)),
        )
        self._few = [tensor for name, tensor in self._tensors.items() if not name.startswith(other)]
        # Bound methods: a look at a hundred places before every token has to take microseconds.
        self._few_pointers = [_held(tensor).data_ptr for tensor in self._few]
        self._few_places = [pointer() for pointer in self._few_pointers]
        self._embed_table: dict[str, Any] = model.embed._parameters
        config = model.config
        sizes: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
        self.handle: Any = kernels.Model(
            sizes | {"quantize": model.numerics == "shipped"},
            {
                name: tensor.parts if isinstance(tensor, StoredTensor) else tensor.detach()
                for name, tensor in self._tensors.items()
            },
            list(config.compress_ratios),
            inverse_frequencies(config, False).tolist(),
            inverse_frequencies(config, True).tolist(),
        )

    @staticmethod
    def takes(model: Transformer) -> bool:
        """Whether the kernels have all that the model asks for: of a weight of another type they would keep a copy.

        Where not, the reference runs. On the CPU and of float32 but for some of it that is said once, or a
        KernelChoiceError where DSV4_KERNELS=native asks for the kernels.
        """
        if model.device.type != "cpu" or model.dtype != torch.float32:
            return False
        if model.config.hc_mult > MOST_STREAMS:
            native.decline(f"the model has {model.config.hc_mult} streams, the native kernels take {MOST_STREAMS}")
            return False
        other = next(((name, p.dtype) for name, p in model.named_parameters() if p.dtype != torch.float32), None)
        if other is not None:
            native.decline(f"{other[0]} is {other[1]}, the native kernels take torch.float32 in every weight")
        return other is None

    def is_current(self, tokens: int) -> bool:
        """Whether every tensor lies where it lay.

        Before a few tokens, and where no module of the process got a parameter, a buffer or a module since, only around
        the layers and in layer 0, of its experts the first: what moves a whole model is seen, `.data` of another
        layer's weight is not. That another tensor is put into a module's table, as `functional_call` does, is then seen
        of the embedding alone.
        """
        if self._embed_table["weight"] is not self._tensors["embed.weight"]:
            return False
        if tokens <= FEW_TOKENS and self.registrations == _registrations:
            return [pointer() for pointer in self._few_pointers] == self._few_places
        registrations = _registrations
        if _places(_tensors(self._model).values()) != self._places:
            return False
        if self.registrations != registrations:
            self.parameter_tables, self.registrations = _tables(self._model), registrations
        return True

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the model makes its own when it is first used

    def forward(
        self, batch: RaggedBatch, cache: Cache, token_ids: Tensor, layers: range, streams: Tensor | None
    ) -> Tensor:
        """Streams [T, hc_mult, d] after `layers`, from `streams` or, where that is None, from the embedding.

        The cache rows are appended to; `streams` itself stays as it is.
        """
        config = self._model.config
        out = torch.empty(batch.num_tokens, config.hc_mult, config.hidden_size, dtype=torch.float32, device="cpu")
        if streams is not None:
            out.copy_(streams.detach())
        inputs = self._inputs(batch, cache, token_ids)
        self.kernels.forward(self.handle, *inputs, layers.start, layers.stop, streams is None, _array(out))
        return out

    def next_token_logits(self, batch: RaggedBatch, cache: Cache, rows: np.ndarray) -> Tensor:
        """Logits fp32 [n, vocab] of rows int64 [n], ascending, of the batch, whose tokens are appended to the cache."""
        logits = torch.empty(len(rows), self._model.config.vocab_size, dtype=torch.float32, device="cpu")
        inputs = self._inputs(batch, cache, batch.token_ids)
        self.kernels.forward_to_logits(self.handle, *inputs, rows, _array(logits))
        return logits

    def _inputs(self, batch: RaggedBatch, cache: Cache, token_ids: Tensor) -> tuple[Any, ...]:
        """What the kernels take of a batch: the cache, the ids, then each sequence's length, start and row."""
        native.follow_torch_threads()
        handle = NativeCache.of(cache, self.kernels).handle
        return handle, _array(token_ids), batch.lengths, batch.starts, batch.slots

    def head(self, streams: Tensor, prefix: str = "") -> Tensor:
        """Logits fp32 [n, vocab] of streams [n, hc_mult, d]; prefix "mtp.0." reads an MTP block out."""
        logits = torch.empty(streams.shape[0], self._model.config.vocab_size, dtype=torch.float32, device="cpu")
        self.kernels.head(self.handle, prefix, _array(streams.contiguous()), _array(logits))
        return logits


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array, which takes less time to hand over than a tensor."""
    return tensor.detach().numpy()


def _tensors(model: Transformer) -> dict[str, Tensor]:
    # A tensor that two modules share has two names.
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _places(tensors: Any) -> tuple[tuple[int, int], ...]:
    return tuple((held.data_ptr(), held.stride(0)) for held in map(_held, tensors))


def _held(tensor: Tensor) -> Tensor:
    return tensor.codes if isinstance(tensor, StoredTensor) else tensor
