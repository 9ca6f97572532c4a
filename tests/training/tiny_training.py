"""Small real models for training tests, and batches that exercise every part of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.newton_schulz import product_dtype
from dsv4.training.optim import MuonAdamW

VOCAB, SEED = 50, 2
CONFIG = replace(
    ModelConfig.preset("nano"), vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_hash_layers=1,
    num_attention_heads=2, head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8,
    n_routed_experts=4, moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip


def make_model(seed: int = SEED, **changes: Any) -> tuple[Transformer, MuonAdamW]:
    config = replace(CONFIG, **changes)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model, MuonAdamW(model, config, compute_dtype=product_dtype(model.device))


@dataclass
class Rows:
    """A batch: documents and their loss masks, 1 for targets."""

    documents: list[list[int]]
    loss_masks: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.loss_masks:
            self.loss_masks = [[1] * len(document) for document in self.documents]


def draw_documents(seed: int, *lengths: int) -> list[list[int]]:
    """Documents that count with random increments, which a few training steps can learn."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCAB, (len(lengths), 2), generator=generator).tolist()
    return [[(a + i * (1 + b % 3)) % VOCAB for i in range(n)] for n, (a, b) in zip(lengths, starts, strict=True)]
