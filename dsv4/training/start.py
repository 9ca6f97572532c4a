"""The weights that training begins with: of a model folder, or drawn; whole, or one at a time for ranks' pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from dsv4.checkpoint import iter_float_tensors, load_model
from dsv4.config import ModelConfig
from dsv4.model.initialization import initial_values
from dsv4.model.transformer import Transformer
from dsv4.parallel.pieces import Values
from dsv4.training.hash_routing import balanced_tables

SAMPLE_BYTES = 1 << 16
SAMPLES = 32  # per file


def load_start(folder: Path, config: ModelConfig, device: torch.device) -> Transformer:
    """Model of `config` with the folder's weights as float32 parameters that take gradients."""
    loaded = load_model(folder, device=device, weights="widened")
    if config == loaded.config:
        return loaded.requires_grad_()
    model = declare_model(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.requires_grad_()


def declare_model(config: ModelConfig) -> Transformer:
    """Model of `config` on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Transformer(config)


def folder_values(folder: Path) -> Values:
    """The weights of a model folder in float32; of the tensors that are not asked for, no byte is read."""
    return lambda names: iter_float_tensors(folder, names=names)


def drawn_values(
    config: ModelConfig, generator: torch.Generator, counts: Callable[[], Sequence[float]] | None = None
) -> Values:
    """The values that init_weights and then, with `counts`, install_tables draw; every rank draws all of them."""

    def values(names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        model = declare_model(config)
        drawn = initial_values(model, config, generator)
        if counts is not None:
            drawn = chain(drawn, balanced_tables(model, counts(), generator))
        return ((name, value) for name, value in drawn if name in names)

    return values


def fingerprint(folder: Path) -> str:
    """Digest of the weights of a model folder: names and sizes of its files and samples of them, small ones whole."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
