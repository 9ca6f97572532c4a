"""The fused forward composes the native rungs: Block.forward on the rungs gives its bits."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model, tiny_config

# New tokens of each of three sequences, step after step: alone and together, across the edges of 4, 128 and a tile.
STEPS = ((5, 131, 0), (600, 0, 130), (1, 0, 1), (1, 0, 1), (90, 1, 200))
# Operations of a layer; sinkhorn and topk are parts of mhc, router and indexer, sampling and losses come after.
COMPOSED = set(backends.NATIVE) - {"cross_entropy", "index_loss", "newton_schulz", "sampling", "sinkhorn", "topk"}


def streams_of(model: Transformer, backend: Any) -> list[Tensor]:
    """Streams after each step in a cache, then those of a forward without a cache, and of its MTP block."""
    cache, at, out = model.new_cache(3, 900), [0, 0, 0], []
    generator = torch.Generator().manual_seed(5)
    for step in STEPS:
        slots = [i for i, n in enumerate(step) if n]
        ids = [torch.randint(0, 97, (step[i],), generator=generator).tolist() for i in slots]
        batch = RaggedBatch.pack(ids, [at[i] for i in slots], slots)
        cache.reserve(batch.slots, batch.starts, batch.lengths)
        out.append(backend.run(batch, cache))
        cache.advance(batch.slots, batch.lengths)
        at = [a + n for a, n in zip(at, step, strict=True)]
    batch = RaggedBatch.pack([list(range(5)), [i % 97 for i in range(200)]])
    out.append(backend.run(batch, None))
    out.append(backend.run_mtp(batch, None, batch.token_ids.flip(0), out[-1], 0))
    return out


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_the_fused_forward_has_the_bits_of_the_composed_rungs(
    kernels: Any, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fp32 weights, which every instruction set multiplies alike in the fused forward and in the rungs."""
    model, ran = random_model(tiny_config(), 1, numerics), Counter[str]()
    decide = backends.uses_native

    def uses_native(operation: str, *tensors: Tensor | None) -> bool:
        native = decide(operation, *tensors)
        ran[operation] += native
        assert native, f"{operation} has left the native rungs"
        return native

    with torch.no_grad():
        monkeypatch.setattr(backends, "requested", lambda: True)
        fused = streams_of(model, model.backend)
        monkeypatch.setattr(backends, "uses_native", uses_native)
        composed = streams_of(model, ReferenceBackend(model))
    only_shipped = set() if numerics == "shipped" else {"quant", "hadamard"}
    assert {op for op in COMPOSED if ran[op]} == COMPOSED - only_shipped
    for step, (a, b) in enumerate(zip(fused, composed, strict=True)):
        assert torch.equal(a, b), f"step {step}: {float((a - b).abs().max())} apart"
