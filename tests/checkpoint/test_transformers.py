"""Folders exchanged with transformers: save_pretrained's are read here, ours are loaded by from_pretrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dsv4.checkpoint import convert, load_model, names, save_model
from dsv4.config import ModelConfig
from dsv4.model.stacks import official_tensors

transformers = pytest.importorskip("transformers")

LENGTH = 150  # more than one window, one HCA entry, many CSA entries


@pytest.fixture(scope="module")
def hf_model(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random DeepseekV4ForCausalLM of the tiny shape; no zeros, so that every tensor matters to the logits."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(tiny_config.to_dict(quantized=False)))
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = transformers.DeepseekV4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                # Distinct experts per row: transformers counts a repeated one twice.
                deal = torch.rand(tiny_config.vocab_size, tiny_config.n_routed_experts).argsort(-1)
                buffer.copy_(deal[:, : tiny_config.num_experts_per_tok])
            elif name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def saved(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    hf_model.save_pretrained(folder)
    return folder


def token_ids(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def stored_names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            found |= set(shard.keys())
    return found


def load_hf(folder: Path) -> Any:
    """from_pretrained in float32, nothing missing and nothing unexpected."""
    model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def test_a_folder_of_save_pretrained_gives_the_same_logits(
    hf_model: Any, saved: Path, tiny_config: ModelConfig
) -> None:
    model = load_model(saved)
    assert model.config.num_nextn_predict_layers == 0
    ids = token_ids(tiny_config)
    with torch.no_grad():
        expected = hf_model(ids).logits.float()
        assert (model(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_we_write_the_names_that_save_pretrained_writes(saved: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    convert(saved, tmp_path / "again", "transformers")
    assert stored_names(tmp_path / "again") == stored_names(saved)
    ours = official_tensors(load_model(saved).state_dict())
    assert {names.to_official(name) for name in stored_names(saved)} == set(ours)


def test_sharded_folders_of_transformers_are_read(hf_model: Any, saved: Path, tmp_path: Path) -> None:
    hf_model.save_pretrained(tmp_path / "sharded", max_shard_size="400KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, parts = load_model(saved).state_dict(), load_model(tmp_path / "sharded").state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_bf16_folders_of_transformers_are_read(hf_model: Any, saved: Path, tmp_path: Path) -> None:
    """In these folders norms and mHC stay float32 on disk."""
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    wide, short = load_model(saved).state_dict(), load_model(tmp_path / "bf16").state_dict()
    for name, tensor in wide.items():
        if tensor.dim() == 1 or "hc_" in name or name.endswith(("ape", "tid2eid")):
            assert torch.equal(short[name], tensor), name
        else:
            assert torch.equal(short[name], tensor.bfloat16().float()), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000])
def test_our_folders_load_in_transformers_with_the_same_logits(
    max_shard_bytes: int, official_folder: Path, official: Any, tmp_path: Path
) -> None:
    """From the official layout, MTP block included: transformers ignores the block, and our reader finds it again."""
    ours = load_model(official_folder)
    convert(official_folder, tmp_path / "converted", "transformers", max_shard_bytes=max_shard_bytes)
    save_model(ours, ours.config, tmp_path / "saved", "transformers", max_shard_bytes=max_shard_bytes)
    ids = token_ids(official.config)
    with torch.no_grad():
        expected = ours(ids)
        for folder in ("converted", "saved"):
            theirs = load_hf(tmp_path / folder)
            assert (theirs(ids).logits.float() - expected).abs().max() < 1e-4 * expected.abs().max()
            again = load_model(tmp_path / folder)
            assert again.config == official.config
            state = official_tensors(again.state_dict())
            assert all(torch.equal(state[name], value) for name, value in official.values.items())


def test_module_state_of_transformers_merged_experts(hf_model: Any, saved: Path, tmp_path: Path) -> None:
    """A folder made from state_dict(), with transformers' own module names and all experts of a layer in one tensor."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in hf_model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    merged, split = load_model(tmp_path).state_dict(), load_model(saved).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in split.items())
