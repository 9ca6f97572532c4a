"""A run's state handed over between one process and ranks. Only one kind is there, but for a kill in between: then the
one of the later step counts."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4.model.lora import is_adapter
from dsv4.parallel.checkpoint import (
    read_checkpoint,
    remove_checkpoints,
    restore_checkpoints,
    whole_steps,
    write_checkpoint,
)
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.optim import MuonAdamW
from dsv4.training.stability import suspects
from dsv4.training.state import RunPosition, StateError, load_state, read_position, run_tensors, save_state

if TYPE_CHECKING:
    from dsv4.model.transformer import Transformer

STATE, KEPT, CHECKPOINTS = "state.pt", "kept", "checkpoints"  # of one process, and of ranks, in a run's folder


def has_state(run_dir: Path) -> bool:
    """True if the run has saved its state, in one process or on ranks."""
    return (run_dir / STATE).exists() or bool(whole_steps(run_dir / CHECKPOINTS))


def pack_run(
    progress: RunPosition, updates: Mapping[AttentionPhase, int], random: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Contents of a checkpoint of ranks beside the tensors: position, what is common, suspicion (Checkpoints.start).

    updates: of the optimizer, by phase; random: states of the ranks' generators.
    """
    position = {f.name: getattr(progress, f.name) for f in fields(progress)}
    stability = position.pop("stability")  # whose routing is of tensors
    position["updates"] = dict(updates)
    position["rng"] = {f"rng.{rank}": bytes(state.tolist()).hex() for rank, state in enumerate(random)}
    return position, {"stability": stability} if stability else {}, suspects(stability)


def unpack_run(
    position: dict[str, Any], common: dict[str, Any], rank: int = 0, ranks: int = 1
) -> tuple[RunPosition, dict[AttentionPhase, int]]:
    """(where the run is, its updates by phase) of what `pack_run` made; `rank` of `ranks` takes its random state.

    Another number of ranks than those that wrote it begins with random states of its own.
    """
    updates, random = position.pop("updates"), position.pop("rng")
    if len(random) == ranks:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(random[f"rng.{rank}"])), dtype=torch.uint8))
    return RunPosition(**position, **common), updates


def named_tensors(model: Transformer, optimizer: MuonAdamW) -> dict[str, Tensor]:
    """Tensors that a run changes, by the names in a checkpoint of ranks (ShardedMuonAdamW.state), not copied."""
    tensors = {name: tensor.detach() for name, tensor in run_tensors(model).items()}
    muon = {rule.name for rule in optimizer.rules if rule.kind == "muon"}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found[f"model.{name}"] = tensor
        if name in muon:
            found[f"momentum.{name}"] = optimizer.momentum_of(name)
        elif name in optimizer.parameters:
            found[f"exp_avg.{name}"], found[f"exp_avg_sq.{name}"] = optimizer.moments_of(name)
        if name in muon and ".experts." in name and not is_adapter(name):
            for kind in ("model", "momentum"):
                stack = found.pop(f"{kind}.{name}")
                found |= {f"{kind}.{name}.{number}": matrix for number, matrix in enumerate(stack)}
    return found


def take_checkpoint(run_dir: Path, model: Transformer, optimizer: MuonAdamW) -> None:
    """Save the last checkpoint of ranks, if there is one, as the state of one process, in place of the checkpoints.

    Model and optimizer take it. StateError if it is damaged or of another model.
    """
    folder = run_dir / CHECKPOINTS
    restore_checkpoints(folder)
    steps = whole_steps(folder)
    if steps and steps[-1] > _state_step(run_dir):
        optimizer.start_adamw()
        try:
            found, common = read_checkpoint(folder / f"step-{steps[-1]}", named_tensors(model, optimizer))
        except ValueError as error:
            raise StateError(str(error)) from error
        progress, updates = unpack_run(found, common)
        optimizer.start_adamw(updates)
        save_state(run_dir / STATE, model, optimizer, progress)
    remove_checkpoints(folder)


def take_state(run_dir: Path, model: Transformer, settings: dict[str, Any]) -> None:
    """Write the state of one process, if there is one, as a checkpoint that any ranks read, in its place.

    settings: of the optimizer. The whole `model` takes it, or a copy of one on the meta device, in memory. StateError
    if it is damaged or of another model.
    """
    if not (run_dir / STATE).exists():
        return
    if model.device.type == "meta":
        model = copy.deepcopy(model).to_empty(device="cpu")
    if _state_step(run_dir) > max(whole_steps(run_dir / CHECKPOINTS), default=-1):
        optimizer = MuonAdamW(model, model.config, **settings)
        with torch.random.fork_rng(devices=[]):
            progress = load_state(run_dir / STATE, model, optimizer)
            random = torch.get_rng_state()
        updates = optimizer.updates()
        optimizer.start_adamw(updates)
        tensors, packed = named_tensors(model, optimizer), pack_run(progress, updates, [random])
        write_checkpoint(run_dir / CHECKPOINTS, progress.step, tensors, *packed)
    (run_dir / STATE).unlink()
    shutil.rmtree(run_dir / KEPT, ignore_errors=True)


def _state_step(run_dir: Path) -> int:
    path = run_dir / STATE
    return read_position(path).step if path.exists() else -1
