"""Training that goes on with the weights of a model folder: continued pre-training, full fine-tuning, LoRA."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dsv4.checkpoint import load_model
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer

SAMPLE_BYTES = 1 << 16
SAMPLES = 32  # per file


def load_start(folder: Path, config: ModelConfig, device: torch.device) -> Transformer:
    """Model of `config` with the folder's weights as float32 parameters that take gradients."""
    loaded = load_model(folder, device=device, weights="widened")
    if config == loaded.config:
        return loaded.requires_grad_()
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model.requires_grad_()


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
