"""Muon + AdamW: the split covers each parameter once, and one step equals the report's formulas."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsv4.training.newton_schulz import orthogonalize
from dsv4.training.optim import MuonAdamW, parameter_rule, split_parameters

CONFIG = SimpleNamespace(num_attention_heads=3, o_groups=2, index_n_heads=5, hc_mult=4)


def rule(name: str, *shape: int):
    return parameter_rule(name, shape, CONFIG)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "rows"),
    [
        ("embed.weight", (50, 8), "adamw", ()),
        ("head.weight", (50, 8), "adamw", ()),
        ("norm.weight", (8,), "adamw", ()),
        ("layers.0.attn_norm.weight", (8,), "adamw", ()),
        ("layers.2.attn.compressor.norm.weight", (8,), "adamw", ()),
        ("mtp.0.enorm.weight", (8,), "adamw", ()),
        ("mtp.0.hnorm.weight", (8,), "adamw", ()),
        ("hc_head_base", (4,), "adamw", ()),
        ("hc_head_scale", (1,), "adamw", ()),
        ("layers.1.hc_attn_base", (24,), "adamw", ()),
        ("layers.1.hc_ffn_scale", (3,), "adamw", ()),
        ("layers.1.attn.attn_sink", (3,), "adamw_no_decay", ()),
        ("layers.3.ffn.gate.bias", (6,), "by_rule", ()),
        ("layers.3.ffn.gate.weight", (6, 8), "muon", (6,)),
        ("layers.1.hc_attn_fn", (24, 32), "muon", (4, 4, 16)),
        ("hc_head_fn", (4, 32), "muon", (4,)),
        ("layers.0.attn.wq_b.weight", (12, 8), "muon", (4, 4, 4)),
        ("layers.2.attn.indexer.wq_b.weight", (20, 8), "muon", (4,) * 5),
        ("layers.0.attn.wo_a.weight", (10, 6), "muon", (5, 5)),
        ("layers.0.attn.wkv.weight", (4, 8), "muon", (4,)),
        ("layers.2.attn.compressor.ape", (4, 8), "muon", (4,)),
        ("layers.2.ffn.experts.w2", (3, 8, 4), "muon", (8, 8, 8)),
        ("layers.2.ffn.shared_experts.w2.weight", (8, 4), "muon", (8,)),
    ],
)
def test_each_kind_of_parameter_has_its_rule(
    name: str, shape: tuple[int, ...], kind: str, rows: tuple[int, ...]
) -> None:
    found = rule(name, *shape)
    assert (found.kind, found.rows) == (kind, rows)


def test_rows_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"wq_b.*13 rows.*3 independent"):
        rule("layers.0.attn.wq_b.weight", 13, 8)


class Tiny(nn.Module):
    """Parameters under official names, some of each kind."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.RMSNorm(6)
        self.attn = nn.Module()
        self.attn.wq_b = nn.Linear(5, 12, bias=False)
        self.attn.attn_sink = nn.Parameter(torch.zeros(3))
        self.ffn = nn.Module()
        self.ffn.experts = nn.Module()
        self.ffn.experts.w1 = nn.Parameter(torch.empty(3, 4, 6))
        self.ffn.gate = nn.Linear(6, 3)
        self.ffn.gate.bias.requires_grad_(False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def fill_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_split_names_every_parameter_once() -> None:
    model = Tiny()
    counts = Counter(found.name for found in split_parameters(model.named_parameters(), CONFIG))
    assert counts == Counter(name for name, _ in model.named_parameters())


def test_two_muon_steps_equal_the_formula_block_by_block() -> None:
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG, compute_dtype=torch.float32)
    expected = model.attn.wq_b.weight.detach().clone().view(3, 4, 5)
    momentum = torch.zeros(3, 4, 5)
    for seed in (1, 2):
        model.fill_gradients(seed)
        gradient = model.attn.wq_b.weight.grad.view(3, 4, 5) * 0.5
        momentum = 0.95 * momentum + gradient
        update = orthogonalize(0.95 * momentum + gradient, torch.float32) * 5**0.5 * 0.18
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * update
        optimizer.step(lr=0.02, grad_scale=0.5)
    torch.testing.assert_close(model.attn.wq_b.weight.detach().view(3, 4, 5), expected, rtol=0, atol=1e-6)


def test_each_expert_is_orthogonalized_apart_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that end in the middle of a stack."""
    steps = []
    for chunk in (1, 2 * 4 * 6, 1 << 20):
        monkeypatch.setattr("dsv4.training.optim.CHUNK_ELEMENTS", chunk)
        model = Tiny()
        optimizer = MuonAdamW(model, CONFIG, compute_dtype=torch.float32)
        model.fill_gradients(5)
        optimizer.step(lr=0.01)
        steps.append((model.ffn.experts.w1.detach(), optimizer.state_dict()["muon"]["ffn.experts.w1"]))
    for weight, momentum in steps:
        torch.testing.assert_close(weight, steps[0][0], rtol=0, atol=1e-6)
        assert torch.equal(momentum, model.ffn.experts.w1.grad)


def test_state_of_a_model_with_other_matrices_is_refused() -> None:
    state = MuonAdamW(Tiny(), CONFIG).state_dict()
    state["muon"]["ffn.experts.w1"] = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="other matrices"):
        MuonAdamW(Tiny(), CONFIG).load_state_dict(state)


def test_update_rms_is_gamma() -> None:
    model = Tiny()
    before = model.ffn.experts.w1.detach().clone()
    optimizer = MuonAdamW(model, CONFIG, weight_decay=0.0, compute_dtype=torch.float32)
    model.fill_gradients(3)
    optimizer.step(lr=1.0)
    for change in model.ffn.experts.w1.detach() - before:
        assert change.square().mean().sqrt() == pytest.approx(0.18, rel=1e-3)


def test_adamw_decays_norms_but_not_sinks() -> None:
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG)
    norm, sink = model.norm.weight.detach().clone(), model.attn.attn_sink.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step(lr=0.1)
    torch.testing.assert_close(model.norm.weight.detach(), norm * (1 - 0.1 * 0.1))
    assert torch.equal(model.attn.attn_sink.detach(), sink)


def test_expert_without_tokens_only_decays_and_router_bias_stays() -> None:
    model = Tiny()
    bias = model.ffn.gate.bias.detach().clone()
    optimizer = MuonAdamW(model, CONFIG)
    model.fill_gradients(4)
    model.ffn.experts.w1.grad[1] = 0.0
    idle = model.ffn.experts.w1[1].detach().clone()
    optimizer.step(lr=0.01)
    torch.testing.assert_close(model.ffn.experts.w1[1].detach(), idle * (1 - 0.01 * 0.1))
    assert torch.equal(model.ffn.gate.bias, bias)


def test_state_continues_to_the_same_bits() -> None:
    def run(stop_after: int | None) -> list[torch.Tensor]:
        model = Tiny()
        optimizer = MuonAdamW(model, CONFIG)
        for seed in range(4):
            model.fill_gradients(seed)
            optimizer.step(lr=0.01)
            if seed == stop_after:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                state = optimizer.state_dict()
                model = Tiny()
                model.load_state_dict(weights)
                optimizer = MuonAdamW(model, CONFIG)
                optimizer.load_state_dict(state)
        return [parameter.detach() for parameter in model.parameters()]

    for straight, resumed in zip(run(None), run(1), strict=True):
        assert torch.equal(straight, resumed)


def test_gradient_norm_spans_all_parameters() -> None:
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG)
    model.fill_gradients(9)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert optimizer.gradient_norm() == pytest.approx(float(flat.norm()), rel=1e-5)
