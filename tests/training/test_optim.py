"""Muon + AdamW: the split covers each parameter once, and one step equals the report's formulas."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsv4.training.newton_schulz import orthogonalize
from dsv4.training.optim import MuonAdamW, parameter_rule, split_parameters

CONFIG = SimpleNamespace(num_attention_heads=3, head_dim=4, o_groups=2, index_n_heads=5, index_head_dim=2, hc_mult=4)


def rule(name: str, *shape: int):
    return parameter_rule(name, shape, CONFIG)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "matrices"),
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
        ("layers.3.ffn.gate.weight", (6, 8), "muon", ((6, 8),)),
        ("layers.1.hc_attn_fn", (24, 32), "muon", ((4, 32), (4, 32), (16, 32))),
        ("hc_head_fn", (4, 32), "muon", ((4, 32),)),
        ("layers.0.attn.wq_b.weight", (12, 8), "muon", ((4, 8),) * 3),
        ("layers.2.attn.indexer.wq_b.weight", (20, 8), "muon", ((4, 8),) * 5),
        ("layers.0.attn.wo_a.weight", (10, 6), "muon", ((5, 6),) * 2),
        ("layers.0.attn.wkv.weight", (4, 8), "muon", ((4, 8),)),
        ("layers.2.attn.compressor.ape", (4, 8), "muon", ((4, 4),) * 2),
        ("layers.2.attn.compressor.wkv.weight", (8, 6), "muon", ((4, 6),) * 2),
        ("layers.2.attn.compressor.wgate.weight", (8, 6), "muon", ((4, 6),) * 2),
        ("layers.2.attn.indexer.compressor.wgate.weight", (4, 6), "muon", ((2, 6),) * 2),
        ("layers.3.attn.compressor.wkv.weight", (4, 6), "muon", ((4, 6),)),
        ("layers.3.attn.compressor.ape", (128, 4), "muon", ((128, 4),)),
        ("layers.2.ffn.experts.w2", (3, 8, 4), "muon", ((8, 4),) * 3),
        ("layers.2.ffn.shared_experts.w2.weight", (8, 4), "muon", ((8, 4),)),
    ],
)
def test_each_kind_of_parameter_has_its_rule(
    name: str, shape: tuple[int, ...], kind: str, matrices: tuple[tuple[int, int], ...]
) -> None:
    found = rule(name, *shape)
    assert (found.kind, found.matrices) == (kind, matrices)


def test_rows_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"wq_b.*13 rows.*3 independent"):
        rule("layers.0.attn.wq_b.weight", 13, 8)
    with pytest.raises(ValueError, match=r"wgate.*6 channels; allowed: window series of 4"):
        rule("layers.2.attn.compressor.wgate.weight", 6, 8)


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
        self.attn.compressor = nn.Module()
        self.attn.compressor.wgate = nn.Linear(6, 8, bias=False)
        self.attn.compressor.ape = nn.Parameter(torch.empty(3, 8))
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


def test_adamw_steps_matrices_too_where_it_is_asked_to() -> None:
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG, weight_decay=0.1, matrices="adamw")
    name = "attn.wq_b.weight"
    assert optimizer.momenta() == [] and all(rule.kind != "muon" for rule in optimizer.rules)
    copy = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    alone = torch.optim.AdamW([copy], lr=0.02, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    for seed in (1, 2):
        model.fill_gradients(seed)
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        copy.grad = gradient * 0.5
        optimizer.step(lr=0.02, grad_scale=0.5)
        alone.step()
    assert torch.equal(model.get_parameter(name), copy)


@pytest.mark.parametrize(("name", "across"), [("wgate.weight", 0), ("ape", 1)])
def test_the_two_series_of_overlapping_windows_are_orthogonalized_apart(name: str, across: int) -> None:
    """Rows of a projection, columns of `ape`."""
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG, weight_decay=0.0, compute_dtype=torch.float32)
    model.fill_gradients(6)
    parameter = model.attn.compressor.get_parameter(name)
    before, series = parameter.detach().clone(), parameter.grad.split(4, across)
    optimizer.step(lr=1.0)
    alone = torch.cat([orthogonalize(one[None], torch.float32)[0] for one in series], across)
    change = alone * 0.18 * max(series[0].shape) ** 0.5
    torch.testing.assert_close(before - parameter.detach(), change, rtol=0, atol=1e-5)


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
    model.fill_gradients(2)
    signs = model.norm.weight.grad.sign(), model.attn.attn_sink.grad.sign()
    optimizer.step(lr=0.1)
    torch.testing.assert_close(model.norm.weight.detach(), norm * (1 - 0.1 * 0.1) - 0.1 * signs[0])
    torch.testing.assert_close(model.attn.attn_sink.detach(), sink - 0.1 * signs[1])


def numbers(model: Tiny, optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    """Copies of the parameters, and of their moments, with "expert N" for the parts of the stack."""
    state = optimizer.state_dict()["muon"]
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    found |= {f"{name} momentum": momentum.clone() for name, momentum in state.items()}
    for name in ("embed.weight", "norm.weight"):
        found[f"{name} moments"] = torch.stack(optimizer.moments_of(name)).clone()
    for name in ("ffn.experts.w1", "ffn.experts.w1 momentum"):
        found |= {name.replace("w1", f"{e}.w1"): expert for e, expert in enumerate(found.pop(name))}
    return found


@pytest.mark.parametrize("chunk", [1, 2 * 4 * 6, 1 << 20])
@pytest.mark.parametrize("missing", [True, False])
def test_what_no_gradient_reaches_stays_and_the_rest_does_not_notice(
    chunk: int, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum of earlier steps, orthogonalized, would move a matrix at full size for hundreds of steps."""
    monkeypatch.setattr("dsv4.training.optim.CHUNK_ELEMENTS", chunk)

    def steps(without: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = Tiny()
        optimizer = MuonAdamW(model, CONFIG, compute_dtype=torch.float32)
        for seed in (1, 2):
            model.fill_gradients(seed)
            optimizer.step(lr=0.01)
        before = numbers(model, optimizer)
        model.fill_gradients(3)
        if without:
            model.ffn.experts.w1.grad[1] = 0.0
            for parameter in (model.attn.compressor.wgate.weight, model.norm.weight):
                parameter.grad = None if missing else torch.zeros_like(parameter)
        optimizer.step(lr=0.01, grad_scale=0.5)
        return before, numbers(model, optimizer)

    (before, after), (_, whole) = steps(True), steps(False)
    idle = {name for name in before if torch.equal(before[name], after[name])}
    wanted = {"norm.weight", "ffn.experts.1.w1", "attn.compressor.wgate.weight"}
    wanted |= {f"{name} momentum" for name in wanted - {"norm.weight"}} | {"norm.weight moments"}
    assert idle == wanted | {"ffn.gate.bias"}
    for name in after.keys() - idle:
        assert torch.equal(after[name], whole[name]), name


def test_a_gradient_that_is_not_finite_is_not_taken_for_none() -> None:
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG, compute_dtype=torch.float32)
    for parameter in (model.ffn.experts.w1, model.norm.weight):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[2] = torch.nan
    optimizer.step(lr=0.01)
    assert [bool(expert.isfinite().all()) for expert in model.ffn.experts.w1] == [True, True, False]
    assert not bool(model.norm.weight.isfinite().all())


@pytest.mark.parametrize("by_updates", [False, True])
def test_state_continues_to_the_same_bits(by_updates: bool) -> None:
    def run(stop_after: int | None) -> list[torch.Tensor]:
        model = Tiny()
        optimizer = MuonAdamW(model, CONFIG)
        for seed in range(5):
            model.fill_gradients(seed)
            if seed < 3:
                model.norm.weight.grad = None  # debiased by the run's updates, not by its own
            optimizer.step(lr=0.01)
            if seed == stop_after:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                state, updates = optimizer.state_dict(), optimizer.updates()
                model = Tiny()
                model.load_state_dict(weights)
                optimizer = MuonAdamW(model, CONFIG)
                optimizer.load_state_dict(state)
                if by_updates:  # as a checkpoint of ranks has them
                    optimizer.start_adamw(updates)
        return [parameter.detach() for parameter in model.parameters()]

    for straight, resumed in zip(run(None), run(1), strict=True):
        assert torch.equal(straight, resumed)


def test_gradient_norm_spans_all_parameters() -> None:
    model = Tiny()
    optimizer = MuonAdamW(model, CONFIG)
    model.fill_gradients(9)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert optimizer.gradient_norm() == pytest.approx(float(flat.norm()), rel=1e-5)
