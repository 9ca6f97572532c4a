"""Quantization-aware training: stored values inside the context, masters outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv4.checkpoint import load_model, save_model
from dsv4.config import ModelConfig
from dsv4.kernels.quant import fake_quant_fp8_blocks
from dsv4.model.parameters import stored_dtype
from dsv4.model.transformer import Transformer
from dsv4.training.qat import as_stored, stored_weights

CONFIG = replace(
    ModelConfig.preset("nano"), vocab_size=50, hidden_size=192, num_hidden_layers=3, num_hash_layers=1,
    n_routed_experts=3, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip


def test_fp8_scale_is_one_power_of_two_a_block() -> None:
    weight = torch.zeros(130, 200)
    weight[0, 0], weight[0, 1] = 500.0, 449.0  # 500 / 448 needs scale 2: steps of 32 * 2 at this size
    weight[129, 199], weight[128, 130] = 0.3, 7.0
    out = fake_quant_fp8_blocks(weight)
    assert out[0, :2].tolist() == [512.0, 448.0]
    # 7 / 448 = 2^-6 exactly: 0.3 * 64 = 19.2, e4m3 steps of 2 there -> 20 / 64.
    assert out[128, 130] == 7.0
    assert out[129, 199] == pytest.approx(20 / 64, abs=0)


def test_rounding_twice_changes_nothing_and_zero_stays() -> None:
    weight = torch.randn(70, 190, generator=torch.Generator().manual_seed(2))
    once = fake_quant_fp8_blocks(weight)
    assert torch.equal(fake_quant_fp8_blocks(once), once)
    assert torch.count_nonzero(fake_quant_fp8_blocks(torch.zeros(3, 5))) == 0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Module()
        self.ffn.experts = nn.Module()
        generator = torch.Generator().manual_seed(0)
        self.ffn.experts.w1 = nn.Parameter(torch.randn(3, 5, 64, generator=generator))
        self.head = nn.Linear(5, 3, bias=False)


def test_masters_return_and_receive_the_gradient_of_the_stored_values() -> None:
    model = Model()
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    with stored_weights(model):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, as_stored(name, masters[name]))
        assert not torch.equal(model.ffn.experts.w1, masters["ffn.experts.w1"])
        model.head(x @ model.ffn.experts.w1[0].T).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name])
    stored = as_stored("ffn.experts.w1", masters["ffn.experts.w1"]).requires_grad_()
    (x @ stored[0].T @ as_stored("head.weight", masters["head.weight"]).T).square().sum().backward()
    torch.testing.assert_close(model.ffn.experts.w1.grad, stored.grad)


def test_masters_return_after_an_error() -> None:
    model = Model()
    before = model.ffn.experts.w1.detach().clone()
    with pytest.raises(RuntimeError, match="boom"), stored_weights(model):
        raise RuntimeError("boom")
    assert torch.equal(model.ffn.experts.w1, before)


def test_training_uses_the_values_read_back_from_a_saved_model(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(4))
    save_model(model, CONFIG, tmp_path / "saved", format="official")
    stored = dict(load_model(tmp_path / "saved").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], as_stored(name, parameter.detach())), name
    rounded = {stored_dtype(name) for name, p in model.named_parameters() if not torch.equal(stored[name], p)}
    assert rounded == {"I8", "F8_E4M3", "BF16"}
