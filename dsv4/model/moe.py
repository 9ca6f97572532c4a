"""Mixture of experts: hash or score routing, clamped SwiGLU, a shared expert. Source: official model.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dsv4.analysis.inventory import FP8_BLOCK
from dsv4.config import ModelConfig
from dsv4.kernels.gather import Dispatch
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.quant import fake_quant_fp8
from dsv4.kernels.router import route_by_score, route_by_token
from dsv4.kernels.swiglu import clamped_swiglu, count_clamped
from dsv4.kernels.topk import top_k_lowest_index
from dsv4.model.aux_losses import AuxLosses, count_differences
from dsv4.model.batch import RaggedBatch, token_positions
from dsv4.model.layout import Layout
from dsv4.model.linear import Linear, linear_fp32
from dsv4.model.recomputed import Kept, Recomputed, recomputed

ClampWatcher = Callable[[Tensor], None]  # takes the counts of count_clamped


class Expert(nn.Module):
    """The shared expert: w2(silu(min(w1 x, limit)) * clamp(w3 x))."""

    def __init__(self, config: ModelConfig, width: int, quantize: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.w1 = Linear(d, width, quantize)
        self.w2 = Linear(width, d, quantize)
        self.w3 = Linear(d, width, quantize)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor, watcher: ClampWatcher | None = None) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        if watcher is not None:
            watcher(count_clamped(gate, up, self.limit))
        h, between = _activate(gate, up, self.limit)
        with between.unkept():
            return self.w2(h)


def _activate(
    gate: Tensor, up: Tensor, limit: float, weights: Tensor | None = None
) -> tuple[Tensor, Recomputed | Kept]:
    """SwiGLU, which the backward computes again from what its own gradient keeps."""
    h = clamped_swiglu(gate, up, limit, weights)
    return h, recomputed(h, clamped_swiglu, gate, up, limit, weights)


class Experts(nn.Module):
    """The routed experts of a layer, stacked: w1 and w3 [E, width, hidden], w2 [E, hidden, width]."""

    def __init__(self, config: ModelConfig, quantize: bool) -> None:
        super().__init__()
        count, d, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(count, width, d))
        self.w2 = nn.Parameter(torch.empty(count, d, width))
        self.w3 = nn.Parameter(torch.empty(count, width, d))
        self.limit, self.quantize = config.swiglu_limit, quantize

    def forward(self, x: Tensor, sizes: list[int], weights: Tensor, watcher: ClampWatcher | None = None) -> Tensor:
        """Apply each expert to its rows: x [n, d] sorted by expert, sizes rows per expert, weights [n, 1] -> [n, d]."""
        if self.quantize:
            x = fake_quant_fp8(x, FP8_BLOCK)
        gate, up = self.product("w1", x, sizes), self.product("w3", x, sizes)
        if watcher is not None:
            watcher(count_clamped(gate, up, self.limit))
        h, between = _activate(gate, up, self.limit, weights)
        if self.quantize:
            h = fake_quant_fp8(h, FP8_BLOCK)
        with between.unkept():
            return self.product("w2", h, sizes)

    def product(self, name: str, x: Tensor, sizes: list[int]) -> Tensor:
        """Rows of each expert times its matrix of the stack `name`, transposed."""
        return grouped_linear(x, sizes, getattr(self, name))


class Gate(nn.Module):
    """Router: experts by token id in hash layers, else by score + bias. See kernels/router."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if hashed:
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64))
            self.bias = None
        else:
            self.tid2eid = None
            self.bias = nn.Parameter(torch.empty(config.n_routed_experts), requires_grad=False)

    def forward(self, x: Tensor, token_ids: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d], token_ids [T] -> (weights fp32 [T, k], expert index [T, k], scores fp32 [T, E]).

        chosen: experts int64 [T, k] in place of the router's choice; rows of -1 leave it.
        """
        logits, scale = linear_fp32(x, self.weight), self.config.routed_scaling_factor
        if chosen is not None:  # a table by row in place of one by token id
            free = chosen[:, :1] < 0
            if self.bias is not None and bool(free.any()):
                own = route_by_score(logits.detach(), self.bias, self.config.num_experts_per_tok, scale)[1]
                chosen = torch.where(free, own, chosen)
            return route_by_token(logits, chosen, torch.arange(len(chosen), device=chosen.device), scale)
        if self.tid2eid is not None:
            return route_by_token(logits, self.tid2eid, token_ids, scale)
        assert self.bias is not None
        return route_by_score(logits, self.bias, self.config.num_experts_per_tok, scale)


class MoE(nn.Module):
    """Routed experts plus the shared expert, accumulated in fp32 in slot order, shared expert first.

    `load` int64 [E]: tokens that each expert has computed, by the native kernels too; the array stays the same one.
    `ahead`: tokens of a document that have to follow a row for it to count in training's loads and balance loss: in an
    MTP block, the last rows have no next token, and what stands in for it says nothing of the router.
    """

    ahead = 0

    def __init__(self, config: ModelConfig, name: str, hashed: bool, quantize: bool) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.gate = Gate(config, hashed)
        self.experts = Experts(config, quantize)
        self.shared_experts = Expert(config, config.moe_intermediate_size, quantize)
        self.load = np.zeros(config.n_routed_experts, dtype=np.int64)

    def forward(self, x: Tensor, token_ids: Tensor, layout: Layout, aux: AuxLosses | None = None) -> Tensor:
        """x [T, d] -> [T, d]."""
        chosen = aux.routing.get(self.name) if aux is not None else None
        watcher = partial(aux.add_clamps, self.name) if aux is not None and aux.count_clamps else None
        weights, index, scores = self.gate(x, token_ids, chosen)
        if aux is not None and aux.compare and chosen is not None and self.gate.bias is not None:
            own = top_k_lowest_index(scores.detach() + self.gate.bias, chosen.shape[1])
            aux.expert_differences += count_differences(chosen, own)
        dispatch = Dispatch(index)
        counts = torch.bincount(index.flatten(), minlength=self.config.n_routed_experts)
        sizes = counts.tolist()
        self.load += np.array(sizes)
        inputs = dispatch.sort(x)
        gathered = recomputed(inputs, dispatch.sort, x)  # the shared expert keeps x
        with gathered.unkept():
            rows = self.experts(inputs, sizes, dispatch.sort_slots(weights).unsqueeze(-1), watcher)
        # A token's experts are added in slot order, ascending after top-k.
        out = dispatch.add_slots(self.shared_experts(x, watcher).float(), rows.float())
        if aux is not None and self.gate.bias is not None:
            self._report(scores, index, layout, aux)
        return out.to(x.dtype)

    def _report(self, scores: Tensor, index: Tensor, layout: Layout, aux: AuxLosses) -> None:
        """Add the layer's loads and its balance loss to `aux`.

        That is the mean over documents, weighted by their tokens, of sum_e f_e * P_e: f the load share (1 when even), P
        the mean normalized affinity, both of the rows that count. In a part of a batch f is of the whole document, P
        this part's share of the document's, so that parts weighted by their tokens have the mean of the whole batch.
        """
        E, k = self.config.n_routed_experts, index.shape[1]
        batch, sequence = layout.batch, layout.sequence_ids
        part = batch.part
        length = torch.from_numpy(batch.lengths if part is None else part.document_lengths).to(scores).unsqueeze(-1)
        share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        counted = index
        if self.ahead:
            rows = _followed(batch, self.ahead).to(scores.device)
            share, counted, sequence = share[rows], index[rows], sequence[rows]
        chosen = torch.zeros_like(share).scatter_(1, counted, 1.0).detach()
        shares = torch.zeros(batch.num_seqs, E, device=scores.device).index_add(0, sequence, share)
        load = torch.zeros(batch.num_seqs, E, device=scores.device).index_add(0, sequence, chosen)
        load = load if part is None else part.add_documents(load)
        count = (length - self.ahead).clamp(min=1)  # rows of a document that count; where there are none, zeros do
        balance = (load * (E / k) / count * shares * (length / count)).sum() / batch.num_tokens
        aux.add_routing(self.name, torch.bincount(counted.flatten(), minlength=E), balance)


def _followed(batch: RaggedBatch, count: int) -> Tensor:
    """bool [T]: rows that `count` tokens of their document follow, be it in another process's part of a batch."""
    ends = batch.lengths.copy()
    if batch.part is not None:
        ends[-1] += len(batch.part.ahead)
    sequence, place = token_positions(batch.lengths, np.zeros_like(batch.lengths))
    return torch.from_numpy(place + count < ends[sequence])


def expert_loads(model: object) -> list[np.ndarray]:
    """`MoE.load` of every layer of a model, MTP blocks last."""
    return [module.load for module in cast(nn.Module, model).modules() if isinstance(module, MoE)]
