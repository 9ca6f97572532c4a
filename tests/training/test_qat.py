"""Quantization-aware training: stored values inside the context, masters outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv4.checkpoint import load_model, save_model
from dsv4.config import ModelConfig
from dsv4.kernels.precision import forward_weights, precision
from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8_blocks
from dsv4.model.attention.indexer import Indexer
from dsv4.model.parameters import stored_dtype
from dsv4.model.transformer import Transformer
from dsv4.training.qat import FP4_TO_FP8_RATIO, as_stored, stored_weights

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


FP4_VALUES = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp4_block(least: int, most: int, largest: float) -> torch.Tensor:
    """A block of 128 x 128 of FP4 values: every code, of either sign, under every scale 2^least to 2^most.

    Its first group has the scale 2^most and the largest value.
    """
    codes = torch.cat((FP4_VALUES, -FP4_VALUES, torch.zeros(1)))
    groups = []
    for scale in range(most, least - 1, -1):
        group = torch.zeros(32)
        group[: len(codes)] = codes.clamp(-largest, largest) * 2.0**scale
        groups.append(group)
    block = torch.zeros(512, 32)
    block[: len(groups)] = torch.stack(groups)
    return block.view(128, 128)


@pytest.mark.parametrize("largest", [3.0, 4.0, 6.0])
@pytest.mark.parametrize("most", [-60, -7, 0, 9])
def test_fp4_values_pass_through_fp8_blocks_without_loss(most: int, largest: float) -> None:
    """Every code under every scale of a block, up to the ratio of scales that the report allows: 2^11."""
    for octaves in range(12):
        block = fp4_block(most - octaves, most, largest)
        assert torch.equal(fake_quant_fp8_blocks(block), block), octaves
    assert FP4_TO_FP8_RATIO == 2.0**11
    # The rule keeps to normal numbers of e4m3; its subnormal ones have three octaves more.
    normal = fp4_block(most - 11, most, 6.0)
    assert (normal[normal != 0].abs() / 2.0 ** (most - 6) >= 2.0**-6).all()
    assert not torch.equal(fake_quant_fp8_blocks(fp4_block(most - 16, most, 6.0)), fp4_block(most - 16, most, 6.0))


def test_experts_in_fp8_precision_multiply_their_fp4_values() -> None:
    master = torch.randn(3, 130, 256, generator=torch.Generator().manual_seed(1))
    stored = as_stored("layers.0.ffn.experts.w1", master)
    assert torch.equal(stored, fake_quant_fp4(master)) and not torch.equal(stored, master)
    for name in ("fp8", "bf16"):
        with precision(name):
            assert torch.equal(forward_weights(stored).widen(), stored)  # pyright: ignore


def test_the_indexer_scores_in_fp4() -> None:
    model = Transformer(CONFIG)
    (indexer,) = (module for module in model.modules() if isinstance(module, Indexer))
    x = torch.randn(5, 2, indexer.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.init_weights(torch.Generator().manual_seed(4))
    assert indexer.rotate_and_quantize(x) is x
    with stored_weights(model):
        rounded = indexer.rotate_and_quantize(x)
        assert torch.equal(fake_quant_fp4(rounded), rounded) and not torch.equal(rounded, x)
        rounded.square().sum().backward()
        assert x.grad is not None and bool(x.grad.any())
    assert indexer.rotate_and_quantize(x) is x
