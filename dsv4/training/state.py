"""The whole state of a run in one file, written atomically: a kill at any moment leaves the last complete one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsv4.checkpoint.atomic import new_file
from dsv4.training.optim import MuonAdamW


@dataclass
class Progress:
    """Where a run stands. The data's position is `step - stage_start`: sources give any batch by its number."""

    step: int = 0
    stage: int = 0
    stage_start: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_state(path: Path, model: nn.Module, optimiser: MuonAdamW, progress: Progress) -> None:
    """Write parameters, buffers, optimiser, progress and random state to `path`."""
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    with new_file(path) as temporary, temporary.open("wb") as handle:
        torch.save(state, handle)  # given a path, it would not say why it cannot write


def load_state(path: Path, model: nn.Module, optimiser: MuonAdamW) -> Progress:
    """Put model, optimiser and random state back as `save_state` found them."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return Progress(**state["progress"])
