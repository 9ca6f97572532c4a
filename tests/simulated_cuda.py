"""A CUDA device that is not there: its tensors are computed on the CPU, and may not meet those of the CPU.

What a GPU refuses is refused here too: an operation on tensors of both devices, but for numbers (0 dimensions), copies
and indices; NumPy arrays of its tensors. Time, memory and rounding are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Operations whose other tensors may be on the CPU.
_ACROSS = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor"}


class CudaTensor(torch.Tensor):
    """A tensor of the device, its values `held` by the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        assert type(held) is Tensor or type(held) is torch.nn.Parameter, type(held)
        held = held.detach()
        found = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("meta"),
        )  # fmt: skip
        found.held = held
        return found

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, CudaTensor) and value.shape == self.shape and value.dtype == self.dtype
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        found = CudaTensor(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            found = torch.nn.Parameter(found, self.requires_grad)
        memo[id(self)] = found
        return found

    def __repr__(self) -> str:
        return f"CudaTensor({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation with a tensor of the device, computed by the CPU."""
    name = func.name()
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    strangers = [one for one in given if not isinstance(one, CudaTensor) and one.dim()]
    first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    if strangers and not (name in _ACROSS and (isinstance(first, CudaTensor) or "copy" in name)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} has some on cuda:0 and cpu")
    to_cpu = kwargs.get("device") == CPU
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    if "_to_copy" in name and to_cpu:
        kwargs["device"] = CPU
    held = tree_map(_held, (args, kwargs))
    out = func(*held[0], **held[1])
    known = {id(_held(one)): one for one in given}
    return tree_map(lambda one: _returned(one, known, to_cpu, first), out)


def _held(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.held
    return CPU if isinstance(value, torch.device) else value


def _returned(value: Any, known: dict[int, Tensor], to_cpu: bool, first: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if id(value) in known:  # written in place
        return known[id(value)]
    return value if to_cpu else CudaTensor(value)


class _Factories(TorchDispatchMode):
    """What autograd makes for a tensor of the device is on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        made = not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        if made and isinstance(device, torch.device) and device.type == "meta":
            return CudaTensor(func(*args, **(kwargs | {"device": CPU})))
        return func(*args, **kwargs)


class _Move(torch.autograd.Function):
    """Values of one device on the other; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype | None, to_cuda: bool) -> Tensor:
        ctx.cuda, ctx.dtype = isinstance(tensor, CudaTensor), tensor.dtype
        held = _held(tensor).detach().to(dtype or tensor.dtype, copy=True)
        return CudaTensor(held) if to_cuda else held

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        held = _held(grads[0]).to(ctx.dtype)
        return (CudaTensor(held) if ctx.cuda else held), None, None


def _is(device: Any, kind: str) -> bool:
    if isinstance(device, str | torch.device):
        return torch.device(device).type == kind
    return False


class _Moves(TorchFunctionMode):
    """Tensors come to the device, and leave it, by calls that name it."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and name in ("to", "cuda", "cpu"):
            named = [*args[1:], *kwargs.values()]
            if name == "cuda":
                named.append(CUDA)
            if name == "cpu":
                named.append(CPU)
            places = [one.device if isinstance(one, Tensor) else one for one in named if _places(one)]
            dtypes = [one.dtype if isinstance(one, Tensor) else one for one in named if _types(one)]
            if places:
                to_cuda = _is(places[0], "cuda")
                if to_cuda != isinstance(tensor, CudaTensor):
                    return _Move.apply(tensor, dtypes[0] if dtypes else None, to_cuda)
                if name != "to" or not dtypes:
                    return tensor
                return tensor.to(dtypes[0])
        if name == "new_tensor" and isinstance(tensor, CudaTensor):
            return CudaTensor(torch.tensor(args[1], dtype=kwargs.get("dtype", tensor.dtype)))
        if _is(kwargs.get("device"), "cuda") and tensor is None:
            return CudaTensor(func(*args, **(kwargs | {"device": CPU})))
        if _is(kwargs.get("device"), "cuda"):
            kwargs.pop("device")
            made = func(*args, **kwargs)
            return made if isinstance(made, CudaTensor) else CudaTensor(made)
        return func(*args, **kwargs)


def _places(value: Any) -> bool:
    return isinstance(value, torch.device | Tensor) or _is(value, "cpu") or _is(value, "cuda")


def _types(value: Any) -> bool:
    return isinstance(value, torch.dtype | Tensor)


@contextmanager
def simulated_cuda() -> Generator[None]:
    """Context in which device="cuda" is the simulated device.

    Inference mode is no_grad here: torch allows no wrappers of its tensors.
    """
    with MonkeyPatch.context() as patch, _Factories(), _Moves():
        run_backward = torch.autograd._engine_run_backward  # pyright: ignore[reportPrivateImportUsage]

        def backward(*args: Any, **kwargs: Any) -> Any:
            with _Moves():  # which torch leaves for the call; functions in Python make tensors in it
                return run_backward(*args, **kwargs)

        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        patch.setattr(torch.inference_mode, "__enter__", _enter)
        patch.setattr(torch.inference_mode, "__exit__", _leave)
        yield


def _enter(context: Any) -> None:
    context.before = torch.is_grad_enabled()
    torch.set_grad_enabled(context.before and not context.mode)


def _leave(context: Any, *_: object) -> None:
    torch.set_grad_enabled(context.before)
