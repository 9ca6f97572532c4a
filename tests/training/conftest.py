"""A stand-in for the Transformer in training tests: the same methods, a few parameters of each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dsv4.kernels.cross_entropy import cross_entropy
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch


class StandIn(nn.Module):
    """Next-token model of the current token only, with two experts chosen by token parity."""

    frozen = False
    config = SimpleNamespace(
        num_hidden_layers=1, num_nextn_predict_layers=0, num_hash_layers=0, compress_ratios=(0,)
    )  # whose MTP block reports no loss

    def __init__(self, vocab: int = 13, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.norm = nn.RMSNorm(width)
        ffn, gate, layer = nn.Module(), nn.Module(), nn.Module()
        gate.bias = nn.Parameter(torch.zeros(2), requires_grad=False)
        ffn.gate = gate
        ffn.experts = nn.Module()
        ffn.experts.w1 = nn.Parameter(torch.empty(2, width, width))
        layer.ffn = ffn
        self.layers = nn.ModuleList([layer])
        self.mtp = nn.ModuleList([nn.Module()])
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.requires_grad and parameter.ndim >= 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward_ragged(self, batch: RaggedBatch, cache: None = None, aux: AuxLosses | None = None) -> Tensor:
        x, parity = self.embed(batch.token_ids), batch.token_ids % 2
        outs = torch.stack([x @ w1.mT for w1 in self.layers[0].ffn.experts.w1])
        x = x + torch.where(parity[:, None] == 0, outs[0], outs[1])
        if aux is not None:
            aux.add_routing("layers.0.ffn", torch.bincount(parity, minlength=2), x.square().mean())
        return x.unsqueeze(1)

    def logits(self, streams: Tensor) -> Tensor:
        return self.head(self.norm(streams.squeeze(1))).float()

    def cross_entropy(self, streams: Tensor, targets: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
        return cross_entropy(self.norm(streams.squeeze(1)), self.head.weight, targets)

    def mtp_forward(
        self, streams: Tensor, following: Tensor, batch: RaggedBatch, cache: None = None, aux: AuxLosses | None = None
    ) -> Tensor:
        return streams + self.embed(following).unsqueeze(1)

    def mtp_logits(self, streams: Tensor) -> Tensor:
        return self.logits(streams)


@dataclass
class ListBatch:
    documents: list[list[int]]
    loss_masks: list[list[bool]] = field(default_factory=list)


class NumberedBatches:
    """Source whose batch depends on its number and the seed only."""

    def __init__(self, seed: int, vocab: int = 13) -> None:
        self.seed, self.vocab = seed, vocab
        self.asked: list[int] = []

    def batch(self, step: int) -> ListBatch:
        self.asked.append(step)
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        lengths = torch.randint(2, 9, (3,), generator=generator).tolist()
        documents = [torch.randint(0, self.vocab, (n,), generator=generator).tolist() for n in lengths]
        return ListBatch(documents, [[True] * n for n in lengths])


@pytest.fixture
def stand_in() -> Callable[[], StandIn]:
    return StandIn


@pytest.fixture
def batches() -> type[NumberedBatches]:
    return NumberedBatches


@pytest.fixture
def split_config() -> SimpleNamespace:
    return SimpleNamespace(num_attention_heads=2, o_groups=1, index_n_heads=2, hc_mult=4)
