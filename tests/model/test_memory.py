"""The plain torch path never builds [tokens, tokens] or [heads, tokens, entries] for a long sequence."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from .tiny import random_ids, random_model, tiny_config

HEADS = 4
PAIRS = 1 << 23  # (head row, key) pairs per group at any length: 32 MB of scores


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native_module", lambda: None)


class LargestTensor(TorchDispatchMode):
    """Elements and shape of the largest tensor that any operation returned; a view counts as all of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.shape = 0, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.elements:
                    self.elements, self.shape = elements, tuple(leaf.shape)
        return out


def csa_and_hca(top_k: int) -> Transformer:
    """Few channels, so that only the attention's tensors could be large."""
    config = tiny_config(
        schedule=(4, 128),
        hidden_size=16,
        num_attention_heads=HEADS,
        head_dim=8,
        qk_rope_head_dim=4,
        q_lora_rank=8,
        o_lora_rank=4,
        index_n_heads=HEADS,
        index_head_dim=4,
        index_topk=top_k,
        moe_intermediate_size=8,
    )
    return random_model(config)


def largest(model: Transformer, tokens: int, chunk: int | None = None) -> tuple[int, tuple[int, ...]]:
    ids = random_ids(model.config, tokens).tolist()
    cache = model.new_cache(1, tokens) if chunk else None
    step = chunk or tokens
    with torch.no_grad(), LargestTensor() as seen:
        for start in range(0, tokens, step):
            model.forward_ragged(RaggedBatch.pack([ids[start : start + step]], starts=[start]), cache)
    return seen.elements, seen.shape


def test_largest_tensor_grows_no_faster_than_the_tokens() -> None:
    """8,192 tokens: [heads, tokens, entries] would have 67 million elements, [tokens, tokens] as many."""
    model = csa_and_hca(top_k=16)
    half, _ = largest(model, 4096)
    whole, shape = largest(model, 8192)
    # A group's scores fill its budget of pairs; a group has at least one tile.
    bound = max(PAIRS, HEADS * 64 * (192 + 8192 // 4))
    assert whole <= 1.01 * bound, shape
    assert whole <= max(2.02 * half, PAIRS), shape


def test_small_budgets_hold_too(monkeypatch: Any) -> None:
    """With a tiny budget a group is one tile, and the remaining memory is linear in tokens."""
    monkeypatch.setattr("dsv4.model.attention.attention.PAIR_BUDGET", 1)
    model = csa_and_hca(top_k=16)
    sizes = {tokens: largest(model, tokens) for tokens in (1024, 2048, 4096)}
    for tokens, (elements, shape) in sizes.items():
        assert elements <= 200 * tokens + HEADS * 64 * (192 + 64), shape
    assert sizes[4096][0] <= 2.02 * sizes[2048][0]


def test_chunks_need_less() -> None:
    """A cached prefill in chunks of 512: the cache itself and one group's scores are the largest."""
    model = csa_and_hca(top_k=16)
    elements, shape = largest(model, 8192, chunk=512)
    assert elements <= HEADS * 512 * (192 + 8192 // 4 + 64) * 1.01, shape


def test_cache_memory_matches_its_shapes() -> None:
    model = csa_and_hca(top_k=16)
    cache = model.new_cache(2, 1000)
    c, pages = model.config, 2 * math.ceil(1000 / 128)
    assert cache.num_bytes() == {
        "window": 3 * 2 * 128 * c.head_dim * 4,
        "state": 2 * 4 * 2 * (8 * 2 * c.head_dim + 8 * 2 * c.index_head_dim + 128 * c.head_dim),
        "entries": 4 * c.head_dim * (pages * 32 + 1 + pages + 1),
        "index_keys": 4 * c.index_head_dim * (pages * 32 + 1),
    }
