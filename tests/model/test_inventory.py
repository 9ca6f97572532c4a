"""The model's parameters against the config's tensor inventory: names, shapes, counts."""

import pytest
import torch

from dsv4.analysis import count_parameters, tensor_inventory
from dsv4.config import ModelConfig
from dsv4.model.stacks import official_tensors
from dsv4.model.transformer import Transformer

from .tiny import tiny_config


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def check(config: ModelConfig) -> Transformer:
    model = on_meta(config)
    listed = {spec.name: spec for spec in tensor_inventory(config, "bf16")}
    shapes = {name: tuple(t.shape) for name, t in official_tensors(model.state_dict()).items()}
    assert shapes == {name: spec.shape for name, spec in listed.items()}
    tables = {name for name, spec in listed.items() if spec.component == "tid2eid"}
    assert {name for name, _ in model.named_buffers()} == tables
    assert all(t.dtype == torch.int64 for _, t in model.named_buffers())
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {name for name, spec in listed.items() if spec.component == "router_bias"}
    assert all(t.is_meta for t in model.state_dict().values())
    return model


def parameters(model: Transformer, mtp: bool) -> int:
    """Parameter count as published, without router biases and integer tables."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.requires_grad and (mtp or not n.startswith("mtp.")))


def test_flash_has_the_tensors_of_its_inventory() -> None:
    model = check(ModelConfig.preset("flash"))
    assert parameters(model, mtp=False) == 284_332_230_231
    assert parameters(model, mtp=True) == count_parameters(ModelConfig.preset("flash")).total_with_mtp


def test_pro_has_the_tensors_of_its_inventory() -> None:
    model = check(ModelConfig.preset("pro"))
    assert parameters(model, mtp=True) == 1_598_837_325_086


def test_nano_has_the_tensors_of_its_inventory() -> None:
    assert parameters(check(ModelConfig.preset("nano")), mtp=True) < 30_000_000


@pytest.mark.parametrize(
    "changes",
    [
        {"hc_mult": 3, "o_groups": 1},
        {"compress_ratios": (0, 4, 128, 4), "num_nextn_predict_layers": 0},
        {"schedule": (4,), "num_hash_layers": 0},
    ],
)
def test_other_shapes_have_the_tensors_of_their_inventory(changes: dict[str, object]) -> None:
    check(tiny_config(**changes))


def test_a_model_of_other_window_width_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window 64: this implementation has windows of 128 tokens"):
        on_meta(tiny_config(sliding_window=64))


def test_shipped_numerics_need_a_power_of_two_for_the_indexer() -> None:
    with pytest.raises(ValueError, match="index_head_dim 48: shipped numerics rotate it by Hadamard"):
        Transformer(tiny_config(index_head_dim=48), "shipped")
