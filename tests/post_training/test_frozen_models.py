"""Models that a run reads: with the values that the policy is served with, whatever their folder's format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.checkpoint import load_model, save_model
from dsv4.model.transformer import Transformer
from dsv4.post_training.frozen_models import PolicyCopy, load_frozen
from dsv4.training.qat import as_stored, stored_weights
from dsv4.training.state import StateError

from .small_policy import small_policy


def values(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.requires_grad_().named_parameters()}


@pytest.mark.parametrize("format", ["official", "bf16", "fp32"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_frozen_model_has_the_values_that_the_policy_computes_with(
    format: str, quantized: bool, tmp_path: Path
) -> None:
    model = small_policy()[0].model
    save_model(model, model.config, tmp_path / "model", format=format)  # pyright: ignore[reportArgumentType]
    frozen = load_frozen(tmp_path / "model", quantized)
    assert frozen.frozen
    policy = load_model(tmp_path / "model", weights="widened").requires_grad_()
    want = {name: as_stored(name, p.detach()) if quantized else p.detach() for name, p in policy.named_parameters()}
    found = values(frozen)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def test_a_copy_follows_the_policy_when_it_is_told_to_and_is_the_same_from_its_file(tmp_path: Path) -> None:
    policy = small_policy()[0].model
    copy = PolicyCopy(policy, quantized=True)
    with stored_weights(policy, indexers=False):
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with torch.no_grad():
        policy.head.weight.mul_(1.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.model.named_parameters())
    copy.save(tmp_path / "copy.safetensors")
    copy.follow(policy)
    assert torch.equal(copy.model.head.weight, as_stored("head.weight", policy.head.weight.detach()))
    copy.load(tmp_path / "copy.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.model.named_parameters())
    with pytest.raises(StateError, match=r"none\.safetensors is missing: the run was saved with these weights"):
        copy.load(tmp_path / "none.safetensors")
