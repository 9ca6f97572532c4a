"""Training that goes on with the weights of a model folder: continued pre-training, full fine-tuning, LoRA."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dsv4.analysis.inventory import tensor_inventory
from dsv4.checkpoint import load_model
from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer

SAMPLE_BYTES = 1 << 16
SAMPLES = 32  # per file


def check_shapes(config: ModelConfig, start: ModelConfig, name: str) -> None:
    """ValueError naming the first tensor that `config` has otherwise than the model `start` in the folder `name`."""
    found, wanted = ({spec.name: spec.shape for spec in tensor_inventory(c, "fp32")} for c in (start, config))
    for tensor in [*wanted, *found]:
        if found.get(tensor) != wanted.get(tensor):
            shapes = " and ".join(str(list(s[tensor])) if tensor in s else "absent" for s in (wanted, found))
            raise ValueError(
                f"the keys of the model change its tensors: {tensor} would be and is, in {name}, {shapes}; allowed "
                "with a start: keys that leave every tensor its shape"
            )


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
