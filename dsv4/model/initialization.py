"""Initial weights for training from scratch. Source of the gates: mHC paper; the rest are this project's choices."""

from __future__ import annotations

import math

import torch
from torch import nn

from dsv4.config import ModelConfig
from dsv4.model.parameters import module_name, row_of
from dsv4.model.stacks import official_tensors


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Fill every parameter by its row in parameters.py: matrices N(0, initializer_range), norms 1, sinks 0, ...

    Initial mHC: pre = 1 / s each, post = 1, the combine matrix nearly the identity, gates 0.01: the streams stay nearly
    equal copies and a block acts as a pre-norm residual block. Hash tables assign the experts evenly.
    """
    s = config.hc_mult
    base = torch.zeros(s * (2 + s))
    base[:s] = -math.log(s - 1) if s > 1 else 8.0
    base[2 * s :] = 8.0 * torch.eye(s).flatten()
    # Matrix by matrix in checkpoint order, so that a seed gives the same model however tensors are stacked.
    for name, p in official_tensors(dict(model.named_parameters())).items():
        init = row_of(module_name(name)[0]).init
        if init == "normal":
            p.normal_(0.0, config.initializer_range, generator=generator)
        elif init == "hc_base":
            p.copy_(base)
        else:
            p.fill_({"ones": 1.0, "zeros": 0.0, "hc_head_base": float(base[0]), "hc_scale": 0.01}[init])
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(deal_experts(config, generator))


def deal_experts(config: ModelConfig, generator: torch.Generator | None = None) -> torch.Tensor:
    """A hash routing table int64 [vocab, k]: k distinct experts per token, every expert equally often (to one deal).

    Rows are dealt one by one from shuffled decks; a deck is reshuffled when fewer than k distinct experts remain.
    """
    E, k = config.n_routed_experts, config.num_experts_per_tok
    per_deck = E // k
    decks = -(-config.vocab_size // per_deck)
    rows = [torch.randperm(E, generator=generator)[: per_deck * k].view(per_deck, k) for _ in range(decks)]
    return torch.cat(rows)[: config.vocab_size]
