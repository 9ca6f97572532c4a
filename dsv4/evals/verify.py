"""Compare a model folder's logits here with an independent implementation's (`dsv4 verify`)."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsv4.checkpoint import convert, load_model

TOLERANCE = 1e-4  # fp32 against fp32, over the range of the logits; the observed deviation is about 1e-5 of it
LENGTHS = (7, 129, 260)


def max_deviation(path: str | Path, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> tuple[float, float]:
    """(largest |difference| of logits with transformers, largest |logit|) over random prompts, fp32, float numerics.

    The folder is converted for transformers in a temporary place. Needs the `transformers` package.
    """
    transformers: Any = importlib.import_module("transformers")
    ours = load_model(path, dtype=torch.float32, numerics="float")
    generator = torch.Generator().manual_seed(seed)
    deviation = largest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "transformers"
        convert(path, folder, format="transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for length in lengths:
            ids = torch.randint(0, ours.config.vocab_size, (1, length), generator=generator)
            with torch.no_grad():
                left, right = ours(ids), theirs(ids).logits.float()
            deviation = max(deviation, float((left - right).abs().max()))
            largest = max(largest, float(right.abs().max()))
    return deviation, largest


def verify(model: str | Path, against: str = "transformers") -> int:
    """Print the largest deviation from `against`; 0 when it is within tolerance, else 1."""
    if against != "transformers":
        raise ValueError(f"against is {against!r}; allowed: transformers")
    deviation, largest = max_deviation(model)
    agrees = deviation <= TOLERANCE * max(1.0, largest)
    print(
        f"largest logit {largest:.4f}, largest deviation from {against} {deviation:.3e}: {'ok' if agrees else 'NOT ok'}"
    )
    return 0 if agrees else 1
