"""Compare dsv4's logits of a model folder with an independent implementation's (`dsv4 verify`)."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoint import convert, load_model
from dsv4.kernels.router.reference import repeats
from dsv4.model.transformer import Transformer
from dsv4.model_folder import resolve_model

TOLERANCE = 1e-4  # relative to the largest logit, fp32 against fp32; the observed deviation is about 1e-5
LENGTHS = (7, 129, 260)
SEED = 1  # of the prompts


def max_deviation(path: str | Path, lengths: tuple[int, ...] = LENGTHS) -> tuple[float, float]:
    """(max |logit difference| from transformers, max |logit|) over random prompts in fp32, float numerics.

    The folder is converted for transformers in a temporary folder. Needs the `transformers` package. Prompts contain no
    token for which a hash-routed layer repeats an expert: transformers counts that expert twice.
    """
    transformers: Any = importlib.import_module("transformers")
    path = resolve_model(path)
    ours = load_model(path, dtype=torch.float32, numerics="float")
    generator = torch.Generator().manual_seed(SEED)
    tokens = _comparable_tokens(ours)
    deviation = largest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "transformers"
        convert(path, folder, format="transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for length in lengths:
            ids = tokens[torch.randint(0, len(tokens), (1, length), generator=generator)]
            with torch.no_grad():
                left, right = ours(ids), theirs(ids).logits.float()
            deviation = max(deviation, float((left - right).abs().max()))
            largest = max(largest, float(right.abs().max()))
    return deviation, largest


def _comparable_tokens(model: Transformer) -> Tensor:
    """Ids of the tokens whose experts are distinct in every hash-routed layer; all ids if there is no such token."""
    repeated = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    for name, table in model.named_buffers():
        if name.endswith("gate.tid2eid"):
            repeated |= repeats(table).any(-1)
    if repeated.any():
        print(f"{int(repeated.sum())} of {len(repeated)} tokens repeat an expert, which transformers counts twice")
    return torch.arange(len(repeated)) if repeated.all() else (~repeated).nonzero().flatten()


def verify(model: str | Path, against: str = "transformers") -> int:
    """Print the largest deviation from `against`; return 0 if it is within tolerance, else 1."""
    if against != "transformers":
        raise ValueError(f"against is {against!r}; allowed: transformers")
    deviation, largest = max_deviation(model)
    agrees = deviation <= TOLERANCE * max(1.0, largest)
    print(
        f"largest logit {largest:.4f}, largest deviation from {against} {deviation:.3e}: {'ok' if agrees else 'NOT ok'}"
    )
    return 0 if agrees else 1
