"""Training in bfloat16 by autocast: fp32 operations stay fp32, and the loss follows fp32's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from dsv4.kernels import backends
from dsv4.kernels.attention.reference import attend_tiles
from dsv4.kernels.grouped_linear import grouped_linear
from dsv4.kernels.indexer.reference import index_scores
from dsv4.kernels.mhc import hc_head, hc_pre
from dsv4.kernels.mhc.reference import distribute
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import ForwardContext
from dsv4.model.linear import linear_fp32
from dsv4.training.gradient import Work, compute_gradient, pack_batch
from dsv4.training.loop import TrainSettings
from dsv4.training.losses import LossWeights
from dsv4.training.schedule import Schedule

from .tiny_training import Rows, draw_documents, make_model

LENGTHS = (150, 6, 45)  # HCA entries, sparse CSA rows, a document without any entry but one


def train(autocast: torch.dtype | None, steps: int, quantized: bool = False) -> list[tuple[float, float, float, float]]:
    """Losses (next token, MTP, balance, indexer) of each step."""
    model, optimizer = make_model()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        work = Work(0, step, LossWeights(balance=0.01), quantized, autocast)
        batch = pack_batch(Rows(draw_documents(step, *LENGTHS)), model.device)
        result = compute_gradient(model, [batch], work)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32, name
                assert bool(parameter.grad.isfinite().all()), name
        optimizer.step(0.02)
        part = result.losses
        losses.append((part.next_token, part.mtp, part.balance, part.indexer))
    return losses


@pytest.mark.parametrize("quantized", [False, True])
def test_losses_follow_those_of_fp32(quantized: bool) -> None:
    plain, rounded = train(None, 12, quantized), train(torch.bfloat16, 12, quantized)
    assert plain != rounded
    assert plain[-1][0] < 0.5 * plain[0][0]  # there is something to follow
    for step, (want, got) in enumerate(zip(plain, rounded, strict=True)):
        assert got[:3] == pytest.approx(want[:3], rel=0.02), f"step {step}"
        # Looser for the indexer: one differently selected entry changes a term of its mean.
        assert got[3] == pytest.approx(want[3], abs=0.05), f"step {step}"


def fp32_parts() -> dict[str, Callable[[], Tensor]]:
    """Operations that must stay fp32, by name, as functions without arguments."""
    model, _ = make_model()
    g = torch.Generator().manual_seed(4)
    c, layer, head = model.config, model.layers[1], model.head
    batch = RaggedBatch.pack(draw_documents(1, 30))
    x = torch.randn(30, c.hidden_size, generator=g)
    streams = torch.randn(30, c.hc_mult, c.hidden_size, generator=g)
    ctx = ForwardContext(c, batch, None, None, model.device)
    q, window = torch.randn(2, 3, 4, 64, generator=g), torch.randn(2, 5, 64, generator=g)
    mask, entries = torch.ones(2, 3, 5, dtype=torch.bool), torch.randn(2, 64, 64, generator=g)
    seen = torch.ones(2, 3, 64, dtype=torch.bool)
    hc = (layer.hc_attn_fn, layer.hc_attn_scale, layer.hc_attn_base, layer.attn_norm.weight)
    return {
        "router": lambda: layer.ffn.gate(x, ctx.token_ids)[2],
        "compressor": lambda: layer.attn.compressor(x, ctx.layout, None, ctx.rope(4).inv_freq, {}),
        "mHC read": lambda: torch.cat([part.flatten() for part in hc_pre(streams, *hc, c)]),
        "mHC write": lambda: distribute(x, streams, streams[:, :, 0], streams[:, :, :4]),
        "read-out": lambda: hc_head(streams, model.hc_head_fn, model.hc_head_scale, model.hc_head_base, c),
        "norm": lambda: layer.attn_norm(x),
        "attention": lambda: attend_tiles(q, window, mask, q[0, 0, :, 0], entries, seen)[0],
        "index scores": lambda: index_scores(q, q[..., 0], entries),
        "balance": lambda: layer.ffn._balance_loss(x[:, :4].abs(), ctx.token_ids[:, None] % 4, ctx.layout),
        "head": lambda: linear_fp32(x, head.weight),
        "logits": lambda: model.logits(streams.requires_grad_()),
    }


@pytest.mark.parametrize("name", fp32_parts())
def test_fp32_operations_have_the_same_bits_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the reference, which runs under autocast."""
    monkeypatch.setattr(backends, "native_module", lambda: None)
    part = fp32_parts()[name]
    want = part()
    with torch.autocast("cpu", torch.bfloat16):
        got = part()
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_products_of_layers_and_experts_are_bfloat16_and_streams_are_not() -> None:
    model, _ = make_model()
    batch, seen = RaggedBatch.pack(draw_documents(1, 30)), {}
    parts = {"layers.1.attn.wq_a", "layers.1.attn.wo_b", "layers.1.ffn.shared_experts.w2", "layers.1"}
    for name in parts:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        streams = model.forward_ragged(batch, aux=AuxLosses())
        ahead = model.mtp_forward(streams, batch.token_ids, batch, aux=AuxLosses())
        rows = grouped_linear(torch.ones(4, 8), [1, 3], torch.ones(2, 6, 8))
    assert {name: dtype == torch.bfloat16 for name, dtype in seen.items()} == {n: n != "layers.1" for n in parts}
    assert (streams.dtype, ahead.dtype, rows.dtype) == (torch.float32, torch.float32, torch.bfloat16)


def test_gradients_of_experts_follow_those_of_fp32() -> None:
    g = torch.Generator().manual_seed(4)
    x, weights = torch.randn(7, 8, generator=g), torch.randn(3, 6, 8, generator=g)
    gradients = []
    for dtype in (None, torch.bfloat16):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            out = grouped_linear(leaves[0], [2, 0, 5], leaves[1])
        out.float().square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
        assert not leaves[1].grad[1].any()
    for want, got in zip(*gradients, strict=True):
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_formats_other_than_bfloat16_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="autocast is torch.float"):
        TrainSettings(Schedule(peak=0.01, warmup_steps=1), autocast=dtype)
