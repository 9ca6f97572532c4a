"""Read a model folder into a model, one tensor at a time: memory holds the model and one tensor."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import tensor_inventory
from dsv4.checkpoint import formats, values
from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.folder import Checkpoint
from dsv4.checkpoint.mapped import LOADED_SCALES, MAPPED_FILES, LoadedScales, MappedFiles
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredStack, StoredTensor, widen_bf16
from dsv4.model.parameters import module_name
from dsv4.model.stacks import official_tensors
from dsv4.model.transformer import Transformer


def iter_float_tensors(
    path: str | Path, *, names: Container[str] | None = None, check_values: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Official parameters and tables of a folder, dequantized, one at a time; each is valid until the next.

    names: of those to read; None: all. check_values: CheckpointError at the first tensor with NaN or infinity, and at a
    table with a number that is no expert's.
    """
    with Checkpoint(path) as checkpoint:
        for spec in tensor_inventory(checkpoint.config, "fp32"):
            if names is not None and spec.name not in names:
                continue
            tensor = checkpoint.parameter(spec.name)
            if check_values:
                values.check_values(checkpoint, spec.name)
                if spec.dtype == "I64":
                    check_expert_ids(tensor, checkpoint, spec.name)
            yield spec.name, tensor


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    numerics: str = "float",
    weights: str | None = None,
    check_values: bool = True,
    revision: str | None = None,
) -> Transformer:
    """Load a model folder, official or saved by transformers, as a frozen model: plain calls run the native kernels.

    path: a folder, or owner/name[@revision] of the Hugging Face Hub, which is downloaded (`dsv4.model_folder`).

    Call `model.requires_grad_(True)` before training.

    weights: "stored" keeps FP4, FP8 and BF16 matrices in the mapped files, where the kernels read them: the model takes
    the memory of its checkpoint, and its float32 results have the same bits (with AMX, up to rounding:
    `kernels.backends.stored_as_widened`). "widened" makes matrices of `dtype`. The
    default is "stored" if the native kernels run the model (CPU, float32), else "widened". `requires_grad_(True)`
    widens.

    dtype: of the matrices. Norms and the tensors that the official layout stores as F32 (mHC, sinks, ape, router bias)
    are float32.
    check_values: CheckpointError names the first value that is not finite. This reads everything but FP4 codes; without
    it nothing need be read before use, and the effect of a non-finite value is undefined.
    `save_model` writes unchanged weights as they were stored: it looks their scales up in the files, which therefore
    stay open.
    """
    device = torch.device(device)
    plain = device.type == "cpu" and dtype == torch.float32
    if weights not in (None, "stored", "widened"):
        raise ValueError(f"weights {weights!r}: allowed are 'stored' and 'widened'")
    if weights == "stored" and not plain:
        raise ValueError(f"weights 'stored' on {device} in {dtype}: they stay as stored on the CPU in torch.float32")
    checkpoint = Checkpoint(path, revision)
    try:
        files = MappedFiles(checkpoint)
        with torch.device("meta"):
            model = Transformer(checkpoint.config, numerics)
        keep = weights == "stored" or (weights is None and plain and backends.native_module() is not None)
        _materialize(model, checkpoint, device, dtype, keep, check_values)
        files.check()
    except BaseException:
        checkpoint.close()
        raise
    _remember(model, checkpoint, files)
    return model.freeze()


def _materialize(
    model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, keep: bool, check: bool
) -> None:
    """Replace every tensor of a model on the meta device by its values, one by one."""
    declared: dict[str, Tensor] = model.state_dict(keep_vars=True)
    official = {spec.name: spec for spec in tensor_inventory(checkpoint.config, "bf16")}
    if declared.keys() != {module_name(name)[0] for name in official}:
        different = sorted(official_tensors(declared).keys() ^ official.keys())
        raise RuntimeError(f"model and inventory name different tensors: {different}")
    places: dict[str, _Place] = {}
    for name, spec in official.items():
        if check:
            values.check_values(checkpoint, name)
        target, number = module_name(name)
        place = places.setdefault(target, _Place(declared[target].shape))
        matrix = spec.dtype == "BF16" and len(spec.shape) == 2
        tensor = _stored(checkpoint, name) if keep and matrix else None
        if tensor is None:
            wanted = dtype if matrix else declared[target].dtype
            tensor = place.empty(number, wanted, device).copy_(checkpoint.parameter(name, device))
            if check and not _wider(wanted) and not tensor.isfinite().all():
                file, stored = checkpoint.place(name)
                raise CheckpointError(file, f"values that {wanted} can hold", "larger ones", stored)
        if spec.dtype == "I64":
            check_expert_ids(tensor, checkpoint, name)
        place.parts.append(tensor)
        if not place.is_filled:
            continue
        value = places.pop(target).value()
        owner, _, leaf = target.rpartition(".")
        if isinstance(declared[target], nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"no checkpoint tensor fills {left}")


class _Place:
    """A tensor of the model while it is read: whole, or as a stack [E, out, in], matrix by matrix in order."""

    def __init__(self, shape: torch.Size) -> None:
        self.parts: list[Tensor] = []
        self._shape = shape
        self._whole: Tensor | None = None

    def empty(self, number: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the tensor, or for matrix `number` of a stack, from one allocation that CPUs take as it fills."""
        if self._whole is None:
            self._whole = torch.empty(self._shape, dtype=dtype, device=device)
        return self._whole if number is None else self._whole[number]

    @property
    def is_filled(self) -> bool:
        """True once every part has been read."""
        return len(self.parts) == (self._shape[0] if len(self._shape) == 3 else 1)

    def value(self) -> Tensor:
        """The tensor; a StoredStack if some matrices stay as stored."""
        stored = [part for part in self.parts if isinstance(part, StoredTensor)]
        if not stored:
            assert self._whole is not None
            return self._whole
        return StoredStack(self.parts) if len(self._shape) == 3 else stored[0]


def _wider(dtype: torch.dtype) -> bool:
    """True if every finite value of a checkpoint is finite in `dtype` too."""
    return not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(torch.float32).max


def _remember(model: Transformer, checkpoint: Checkpoint, files: MappedFiles) -> None:
    """Attach to the model the files that its weights are views of, and its scales, for watching and saving."""
    matrices = official_tensors(dict(model.named_parameters()))
    stored = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, StoredTensor)}
    scales = {name: matrix.scales for name, matrix in stored.items() if matrix.scales is not None}
    if stored:
        setattr(model, MAPPED_FILES, files)
    quantized = checkpoint.layout in ("official", "official-base")
    if quantized:
        setattr(model, LOADED_SCALES, LoadedScales(scales.get if scales else checkpoint.scale, files))
    if scales or not quantized:
        checkpoint.close()  # the model's views stay mapped


def _stored(checkpoint: Checkpoint, name: str) -> StoredTensor | None:
    """A matrix in its mapped encoding; None if the kernels do not read its format."""
    codes, scales = checkpoint.stored(name), checkpoint.scale(name)
    if codes.dtype == torch.int8 and scales is not None:
        return StoredTensor("fp4", codes, scales, formats.dequantize_fp4)
    if codes.dtype == torch.float8_e4m3fn and scales is not None:
        return StoredTensor("fp8", codes, scales, formats.dequantize_fp8)
    return StoredTensor("bf16", codes, None, widen_bf16) if codes.dtype == torch.bfloat16 else None


def check_expert_ids(table: Tensor, checkpoint: Checkpoint, name: str) -> None:
    experts = checkpoint.config.n_routed_experts
    wrong = table[(table < 0) | (table >= experts)]
    if wrong.numel():
        file, stored = checkpoint.place(name)
        raise CheckpointError(file, f"expert numbers from 0 to {experts - 1}", str(int(wrong[0])), stored)
