"""Replicas: two processes that share weights train to the bits that one process would with both micro-batches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.losses import LossWeights
from dsv4.training.optim import MuonAdamW
from dsv4.training.replicas import Replicas, Work

CONFIG = replace(
    ModelConfig.preset("nano"), vocab_size=50, hidden_size=32, num_hidden_layers=3, num_hash_layers=1,
    num_attention_heads=2, head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8,
    n_routed_experts=4, moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip


def make_batches(count: int) -> list[SimpleNamespace]:
    generator = torch.Generator().manual_seed(8)
    batches = []
    for _ in range(count):
        documents = [torch.randint(0, 50, (n,), generator=generator).tolist() for n in (131, 6, 45)]
        batches.append(SimpleNamespace(documents=documents, loss_masks=[[1] * len(d) for d in documents]))
    return batches


def make_model() -> tuple[Transformer, MuonAdamW]:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(2))
    return model, MuonAdamW(model, CONFIG)


def test_two_processes_equal_one_that_takes_both_micro_batches() -> None:
    batches = make_batches(6)
    work = [Work(0, step, LossWeights(), quantised=step == 2) for step in range(3)]
    source = SimpleNamespace(batch=batches.__getitem__)  # a bound built-in method travels by pickle

    model, optimiser = make_model()
    with Replicas(model, optimiser, [source], count=2) as replicas:
        together = []
        for item in work:
            together.append(replicas.gradient(item))
            replicas.update(0.01, 0.5)
            optimiser.zero_grad()

    alone, alone_optimiser = make_model()
    with Replicas(alone, alone_optimiser, [source]) as single:
        for item, results in zip(work, together, strict=True):
            for half in range(2):
                (result,) = single.gradient(replace(item, step=2 * item.step + half))
                assert result.losses == results[half].losses
                assert torch.equal(result.loads["layers.2.ffn"], results[half].loads["layers.2.ffn"])
            single.update(0.01, 0.5)
            alone_optimiser.zero_grad()
    for (name, left), right in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(left, right), name
    for left, right in zip(optimiser.momenta(), alone_optimiser.momenta(), strict=True):
        assert torch.equal(left, right)


def test_senseless_count_is_refused() -> None:
    model, optimiser = make_model()
    with pytest.raises(ValueError, match="replicas is 0"):
        Replicas(model, optimiser, [], count=0)
