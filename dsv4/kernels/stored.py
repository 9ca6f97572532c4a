"""Weights kept in their checkpoint encoding (FP4, FP8, BF16); to torch they look like float32.

`StoredTensor` is a matrix of codes and scales, often views of a mapped file; `StoredStack` is a stack of matrices of
one shape. The native kernels read both in place. A torch operation gets values widened for that operation alone, which
is correct but slow: the reference path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Kind = Literal["fp4", "fp8", "bf16"]
# (codes, scales or None) -> float32 [out, in].
Widen = Callable[[Tensor, Any], Tensor]
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class StoredWeight(torch.Tensor):
    """Base class: float32 to torch, encoded in memory. In-place operations raise RuntimeError; `widen()` decodes."""

    # Operations arrive at __torch_dispatch__; without this every attribute access would go through Python first.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def widen(self) -> Tensor:
        """The values, a new float32 tensor."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        raise NotImplementedError

    def alias(self) -> StoredWeight:
        """Another tensor object over the same memory."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SAME:
            return args[0].alias()
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default and isinstance(args[0], StoredTensor) and args[0].kind == "bf16":
            return args[0].codes[args[1]].to(torch.float32)
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, StoredWeight):
                raise RuntimeError(
                    f"{func} would write to a weight that stays as it is stored ({value!r}); "
                    "model.requires_grad_() or dsv4.load(path, weights='widened') gives float32 weights"
                )
        return func(*tree_map(widened, args), **tree_map(widened, kwargs))


class StoredTensor(StoredWeight):
    """Encoded matrix [out, in]; `parts` are kind, codes as uint8 rows, and scales (uint8, float32 or None)."""

    kind: Kind
    codes: Tensor
    scales: Tensor | None
    _widen: Widen

    @staticmethod
    def __new__(
        cls: type[StoredTensor], kind: Kind, codes: Tensor, scales: Tensor | None, widen: Widen
    ) -> StoredTensor:
        columns = codes.shape[1] * 2 if kind == "fp4" else codes.shape[1]
        # Not annotated in torch: makes a tensor with a shape and no memory.
        tensor: StoredTensor = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, (codes.shape[0], columns), dtype=torch.float32, device=codes.device
        )
        tensor.kind, tensor.codes, tensor.scales, tensor._widen = kind, codes, scales, widen
        return tensor

    def __init__(self, kind: Kind, codes: Tensor, scales: Tensor | None, widen: Widen) -> None:
        pass

    def widen(self) -> Tensor:
        return self._widen(self.codes, self.scales)

    @property
    def parts(self) -> tuple[Kind, Tensor, Tensor | None]:
        """Weight argument of `dsv4._native`: codes and E8M0 scales as bytes."""
        scales = self.scales
        if scales is not None and scales.dtype != torch.float32:
            scales = scales.view(torch.uint8)
        return self.kind, self.codes.view(torch.uint8), scales

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def alias(self) -> StoredTensor:
        return StoredTensor(self.kind, self.codes, self.scales, self._widen)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"StoredTensor({self.kind}, shape={tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As bytes: pickle does not support 8-bit floats.
        kind, codes, scales = self.parts
        dtypes = self.codes.dtype, self.scales.dtype if self.scales is not None else None
        return _remake, (kind, codes, scales, dtypes, self._widen, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        remake, (kind, codes, scales, *rest) = self.__reduce_ex__(4)
        again = remake(kind, codes.clone(), scales.clone() if scales is not None else None, *rest)
        memo[id(self)] = again
        return again


class StoredStack(StoredWeight):
    """Stack [E, out, in] of matrices, each a StoredTensor of any kind or plain float32. Nothing is copied."""

    matrices: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls: type[StoredStack], matrices: Sequence[Tensor]) -> StoredStack:
        first = matrices[0]
        for number, matrix in enumerate(matrices):
            if matrix.shape != first.shape or matrix.dtype != torch.float32:
                found = f"{matrix.dtype} {list(matrix.shape)}"
                raise ValueError(f"matrix {number} of a stack is {found}; allowed: torch.float32 {list(first.shape)}")
        stack: StoredStack = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, (len(matrices), *first.shape), dtype=torch.float32, device=first.device
        )
        stack.matrices = tuple(matrices)
        return stack

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        pass

    def widen(self) -> Tensor:
        values = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for matrix, place in zip(self.matrices, values, strict=True):
            place.copy_(widened(matrix))
        return values

    @property
    def stored_bytes(self) -> int:
        return sum(m.stored_bytes if isinstance(m, StoredTensor) else m.nbytes for m in self.matrices)

    def alias(self) -> StoredStack:
        return StoredStack(self.matrices)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        kinds = sorted({m.kind if isinstance(m, StoredTensor) else "fp32" for m in self.matrices})
        return f"StoredStack({' and '.join(kinds)}, shape={tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restack, (self.matrices, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredStack:
        again = _restack(copy.deepcopy(self.matrices, memo), getattr(self, "_is_param", False))
        memo[id(self)] = again
        return again


def _remake(
    kind: Kind, codes: Tensor, scales: Tensor | None, dtypes: tuple[Any, Any], widen: Widen, is_parameter: bool
) -> StoredTensor:
    scales = scales.view(dtypes[1]) if scales is not None else None
    tensor = StoredTensor(kind, codes.view(dtypes[0]), scales, widen)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor  # pyright: ignore


def _restack(matrices: Sequence[Tensor], is_parameter: bool) -> StoredStack:
    stack = StoredStack(matrices)
    return torch.nn.Parameter(stack, requires_grad=False) if is_parameter else stack  # pyright: ignore


def matrices_of(stack: Tensor) -> Sequence[Tensor]:
    """The matrices [out, in] of a stack [E, out, in]: a StoredStack's own, else views."""
    return stack.matrices if isinstance(stack, StoredStack) else stack.unbind()


def widen_bf16(codes: Tensor, scales: None) -> Tensor:
    """BF16 [out, in] -> float32."""
    return codes.to(torch.float32)


def widened(tensor: Any) -> Any:
    """Float32 values of a stored weight; anything else unchanged."""
    return tensor.widen() if isinstance(tensor, StoredWeight) else tensor


def weight_argument(weight: Tensor) -> Any:
    """Matrix argument of `dsv4._native`: the parts of a stored one, else fp32 with contiguous rows."""
    if isinstance(weight, StoredTensor):
        return weight.parts
    weight = weight.detach()
    return weight if weight.stride(-1) == 1 or weight.shape[-1] == 1 else weight.contiguous()


def rows_argument(x: Tensor) -> Tensor:
    """Row argument of `dsv4._native`: x [..., n] as [rows, n] with contiguous rows, copied only if necessary."""
    rows = x.detach().reshape(-1, x.shape[-1]) if x.dim() != 2 else x.detach()
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
