"""Initial weights for training from scratch. Source of the gates: mHC paper; the rest are this project's choices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dsv4.config import ModelConfig
from dsv4.model.parameters import module_name, row_of
from dsv4.model.stacks import native_tensors


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Fill every parameter and table of `model` with its initial value."""
    tensors = native_tensors(model)
    for name, value in initial_values(model, config, generator):
        tensors[name].copy_(value)


def initial_values(
    model: nn.Module, config: ModelConfig, generator: torch.Generator | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(official name, initial value) of every parameter by its row in parameters.py, and of every table, one at a time.

    Matrices N(0, initializer_range), norms 1, sinks 0, ... Initial mHC: pre = 1 / s each, post = 1, the combine matrix
    nearly the identity, gates 0.01: the streams stay nearly equal copies and a block acts as a pre-norm residual block.
    Hash tables assign the experts evenly. `model` gives names, shapes and dtypes; one on the meta device gets its
    values on the CPU.
    """
    s = config.hc_mult
    base = torch.zeros(s * (2 + s))
    base[:s] = -math.log(s - 1) if s > 1 else 8.0
    base[2 * s :] = 8.0 * torch.eye(s).flatten()
    # Matrix by matrix in checkpoint order, so that a seed gives the same model however tensors are stacked or divided.
    for name, like in native_tensors(model).items():
        if name.endswith("tid2eid"):
            yield name, deal_experts(config, generator)
            continue
        value = torch.empty_like(like, device="cpu" if like.is_meta else None, requires_grad=False)
        init = row_of(module_name(name)[0]).init
        if init == "normal":
            value.normal_(0.0, config.initializer_range, generator=generator)
        elif init == "hc_base":
            value.copy_(base)
        else:
            value.fill_({"ones": 1.0, "zeros": 0.0, "hc_head_base": float(base[0]), "hc_scale": 0.01}[init])
        yield name, value


def deal_experts(config: ModelConfig, generator: torch.Generator | None = None) -> torch.Tensor:
    """A hash routing table int64 [vocab, k]: k distinct experts per token, every expert equally often (to one deal).

    Rows are dealt one by one from shuffled decks; a deck is reshuffled when fewer than k distinct experts remain.
    """
    E, k = config.n_routed_experts, config.num_experts_per_tok
    per_deck = E // k
    decks = -(-config.vocab_size // per_deck)
    rows = [torch.randperm(E, generator=generator)[: per_deck * k].view(per_deck, k) for _ in range(decks)]
    return torch.cat(rows)[: config.vocab_size]
