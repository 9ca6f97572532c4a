"""Weights that stay as their checkpoint stores them, and read like the float32 matrices that they stand for.

`StoredTensor` holds codes and scales (FP4, FP8, BF16), often views of a mapped file. The native kernels read those in
place. Every torch operation gets the widened values, made for that operation: right, and slow, on the reference path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Kind = Literal["fp4", "fp8", "bf16"]
# (codes, scales or None) -> float32 [out, in].
Widen = Callable[[Tensor, Any], Tensor]
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class StoredTensor(torch.Tensor):
    """A float32 matrix [out, in] to torch; `parts` are kind, codes as uint8 rows, and scales (uint8, float32 or None).

    It cannot be written to: in-place operations raise RuntimeError. `widen()` gives a plain tensor.
    """

    kind: Kind
    codes: Tensor
    scales: Tensor | None
    _widen: Widen

    # Operations come to __torch_dispatch__; without this every look at an attribute would take a detour first.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(
        cls: type[StoredTensor], kind: Kind, codes: Tensor, scales: Tensor | None, widen: Widen
    ) -> StoredTensor:
        columns = codes.shape[1] * 2 if kind == "fp4" else codes.shape[1]
        # No annotation in torch: makes a tensor that has a shape and no memory.
        tensor: StoredTensor = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, (codes.shape[0], columns), dtype=torch.float32, device=codes.device
        )
        tensor.kind, tensor.codes, tensor.scales, tensor._widen = kind, codes, scales, widen
        return tensor

    def __init__(self, kind: Kind, codes: Tensor, scales: Tensor | None, widen: Widen) -> None:
        pass

    def widen(self) -> Tensor:
        """The values, a new float32 tensor."""
        return self._widen(self.codes, self.scales)

    @property
    def parts(self) -> tuple[Kind, Tensor, Tensor | None]:
        """As `dsv4._native` takes a weight: codes and E8M0 scales as bytes."""
        scales = self.scales
        if scales is not None and scales.dtype != torch.float32:
            scales = scales.view(torch.uint8)
        return self.kind, self.codes.view(torch.uint8), scales

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"StoredTensor({self.kind}, shape={tuple(self.shape)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As bytes: pickle knows no 8-bit floats.
        kind, codes, scales = self.parts
        dtypes = self.codes.dtype, self.scales.dtype if self.scales is not None else None
        return _remake, (kind, codes, scales, dtypes, self._widen, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        remake, (kind, codes, scales, *rest) = self.__reduce_ex__(4)
        copy = remake(kind, codes.clone(), scales.clone() if scales is not None else None, *rest)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SAME:
            return cls(args[0].kind, args[0].codes, args[0].scales, args[0]._widen)
        if func is torch.ops.aten.embedding.default and isinstance(args[0], StoredTensor) and args[0].kind == "bf16":
            return args[0].codes[args[1]].to(torch.float32)
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, StoredTensor):
                raise RuntimeError(
                    f"{func} would write to a weight that stays as it is stored ({value.kind}); "
                    "model.requires_grad_() or dsv4.load(path, weights='widened') gives float32 weights"
                )
        return func(*tree_map(widened, args), **tree_map(widened, kwargs))


def _remake(
    kind: Kind, codes: Tensor, scales: Tensor | None, dtypes: tuple[Any, Any], widen: Widen, is_parameter: bool
) -> StoredTensor:
    scales = scales.view(dtypes[1]) if scales is not None else None
    tensor = StoredTensor(kind, codes.view(dtypes[0]), scales, widen)
    return torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor  # pyright: ignore


def widen_bf16(codes: Tensor, scales: None) -> Tensor:
    """BF16 [out, in] -> float32."""
    return codes.to(torch.float32)


def widened(tensor: Any) -> Any:
    """What is given, or the values of a stored tensor."""
    return tensor.widen() if isinstance(tensor, StoredTensor) else tensor


def weight_argument(weight: Tensor) -> Any:
    """A matrix as `dsv4._native` takes it: the parts of a stored one, else fp32 with contiguous rows."""
    if isinstance(weight, StoredTensor):
        return weight.parts
    weight = weight.detach()
    return weight if weight.stride(-1) == 1 or weight.shape[-1] == 1 else weight.contiguous()


def rows_argument(x: Tensor) -> Tensor:
    """x [..., n] as `dsv4._native` takes rows: [rows, n] with contiguous rows, a copy only where it has to be."""
    rows = x.detach().reshape(-1, x.shape[-1]) if x.dim() != 2 else x.detach()
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
