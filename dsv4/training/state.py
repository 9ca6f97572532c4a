"""The whole state of a run in one file, written atomically: a kill at any time leaves the last complete file."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from dsv4.checkpoint.atomic import new_file
from dsv4.model.lora import is_adapter
from dsv4.training.optim import MuonAdamW

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Position = TypeVar("Position", bound=DataclassInstance)


@dataclass
class RunPosition:
    """Position of a run. The data's position is `step - stage_start`, since sources give any batch by its number.

    stability: state of the spike detector and of rollbacks (stability.py), empty without them.
    """

    step: int = 0
    stage: int = 0
    stage_start: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stability: dict[str, Any] = field(default_factory=dict)


class StateError(ValueError):
    """A saved state is damaged, or belongs to another model or run."""


def save_state(path: Path, model: nn.Module, optimizer: MuonAdamW, progress: DataclassInstance) -> None:
    """Write what the run changes (`run_tensors`), optimizer, progress and random state to `path`.

    DiskFullError if there is no room; an existing state at `path` is then unchanged.
    """
    state: dict[str, Any] = {
        "model": run_tensors(model),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    needed = sum(tensor.nbytes for _, tensor in _tensors(state, ""))
    with new_file(path, needed) as temporary, temporary.open("wb") as handle:
        torch.save(state, handle)  # given a path, its error would not say why writing failed


def load_state(path: Path, model: nn.Module, optimizer: MuonAdamW, position: type[Position] = RunPosition) -> Position:
    """Restore model, optimizer and random state from `path`; return the position of the run, of class `position`.

    StateError, with nothing changed, if the file is damaged or a tensor differs in name, shape or dtype from those of
    the model and the optimizer.
    """
    state = _read(path)
    expected: dict[str, Any] = {"model": run_tensors(model), "optimizer": optimizer.state_dict()}
    for part, want in expected.items():
        _check_same(path, dict(_tensors(state.get(part), part)), dict(_tensors(want, part)))
    found = _position(path, state, position)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise StateError(f"{path}: {error}") from error
    model.load_state_dict(state["model"], strict=False)  # checked above
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state:  # of all GPUs of then, of which fewer may be here
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
    return found


def read_position(path: Path) -> RunPosition:
    """Position of the run in a saved state, whose tensors stay unread. StateError if it is damaged."""
    return _position(path, _read(path, tensors=False), RunPosition)


def run_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a run changes: of a model with adapters these alone, else all."""
    tensors = dict(model.state_dict())
    return {name: tensor for name, tensor in tensors.items() if is_adapter(name)} or tensors


def _position(path: Path, state: Mapping[str, Any], position: type[Position]) -> Position:
    progress = state.get("progress")
    names = [field.name for field in fields(position)]
    if not isinstance(progress, dict) or set(progress) != set(names):
        raise StateError(f"{path}: progress is {progress!r}; expected {', '.join(names)}")
    return position(**progress)


def _read(path: Path, tensors: bool = True) -> dict[str, Any]:
    """Read a state file and check the CRC of every member, which torch.load does not; without `tensors` their bytes
    are neither read nor checked."""
    again = "remove it to start the run again from its first step"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if tensors else None
        state = None if broken else torch.load(path, map_location="cpu", weights_only=True, mmap=not tensors)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise StateError(
            f"{path} is damaged or no state of a run ({error or type(error).__name__}); {again}"
        ) from error
    if broken is not None:
        raise StateError(f"{path} is damaged: {broken} in it is not what was written; {again}")
    if not isinstance(state, dict) or not {"model", "optimizer", "progress", "rng"} <= set(state):
        raise StateError(f"{path} is no state of a run: it holds no model, optimizer, progress and rng")
    return state


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts and lists, each with the dotted path of its keys."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{name}.{number}")


def _check_same(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """StateError if a tensor is missing or has another shape or dtype. AdamW's moments are checked by the optimizer."""
    for name, want in expected.items():
        if name.startswith("optimizer.adamw."):
            continue  # there are none before the first step
        if name not in found:
            raise StateError(f"{path}: {name} is missing; the state is of another model")
        _check_tensor(path, name, found[name], want)
    extra = [name for name in found if name not in expected and not name.startswith("optimizer.adamw.")]
    if extra:
        raise StateError(f"{path}: {extra[0]} and {len(extra) - 1} more are not in the model; the state is of another")


def _check_tensor(path: Path, name: str, found: Tensor, want: Tensor) -> None:
    if (found.shape, found.dtype) != (want.shape, want.dtype):
        raise StateError(
            f"{path}: {name} is {found.dtype} {tuple(found.shape)}, but the run's is {want.dtype} {tuple(want.shape)}"
        )
