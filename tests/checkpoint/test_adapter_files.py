"""LoRA adapters in PEFT's files: its names and shapes, its rules, and PEFT's own logits where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4.checkpoint import CheckpointError, convert, load_model
from dsv4.checkpoint.adapter_files import Adapter, Pair, to_module, write_adapter
from dsv4.checkpoint.names import to_official
from dsv4.cli import main
from dsv4.config import ModelConfig

RANK, ALPHA = 3, 6.0
MATRICES = {  # names -> (out, in) of the tiny shape
    "layers.1.attn.wq_a": (40, 160),
    "layers.1.attn.wo_b": (160, 144),
    "layers.1.attn.compressor.wgate": (64, 160),
    "layers.1.attn.indexer.wq_b": (32, 40),
    "layers.1.attn.indexer.weights_proj": (2, 160),
    "layers.1.attn.indexer.compressor.wkv": (32, 160),
    "layers.2.ffn.shared_experts.w2": (160, 48),
    "head": (67, 160),
}
STACKS = {
    "layers.2.ffn.experts.w1": (48, 160),
    "layers.2.ffn.experts.w2": (160, 48),
    "layers.2.ffn.experts.w3": (48, 160),
}
MODULES = {
    "layers.1.attn.wq_a": "model.layers.1.self_attn.q_a_proj",
    "layers.1.attn.wo_b": "model.layers.1.self_attn.o_b_proj",
    "layers.1.attn.compressor.wgate": "model.layers.1.self_attn.compressor.gate_proj",
    "layers.1.attn.indexer.wq_b": "model.layers.1.self_attn.compressor.indexer.q_b_proj",
    "layers.1.attn.indexer.weights_proj": "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj",
    "layers.1.attn.indexer.compressor.wkv": "model.layers.1.self_attn.compressor.indexer.kv_proj",
    "layers.2.ffn.shared_experts.w2": "model.layers.2.mlp.shared_experts.down_proj",
    "head": "lm_head",
}


def pairs(experts: int = 5) -> dict[str, Pair]:
    draw = torch.Generator().manual_seed(3)

    def pair(shape: tuple[int, int], *stack: int) -> Pair:
        return Pair(
            torch.randn(*stack, RANK, shape[1], generator=draw) * 0.1,
            torch.randn(*stack, shape[0], RANK, generator=draw) * 0.1,
        )

    plain = {name: pair(shape) for name, shape in MATRICES.items()}
    return plain | {name: pair(shape, experts) for name, shape in STACKS.items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(pairs(), RANK, ALPHA, "owner/base", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_names_are_transformers_and_come_back(adapter: Path) -> None:
    assert {name: to_module(name) for name in MATRICES} == MODULES
    assert {to_official(f"{module}.weight") for module in MODULES.values()} == {f"{name}.weight" for name in MATRICES}
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.lora_A.weight"].shape == (3, 160)
    experts = "base_model.model.model.layers.2.mlp.experts."
    assert {key.removeprefix(experts): list(t.shape) for key, t in tensors.items() if key.startswith(experts)} == {
        "base_layer.lora_A.weight": [5 * 6, 160],
        "base_layer.lora_B.weight": [96, 5 * 6],
        "lora_A.weight": [5 * 3, 48],
        "lora_B.weight": [160, 5 * 3],
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["target_parameters"] == [f"model.layers.2.mlp.experts.{n}_proj" for n in ("gate_up", "down")]
    assert (settings["r"], settings["rank_pattern"]) == (3, {r".*\.gate_up_proj": 6})


def test_merging_adds_the_product(
    adapter: Path, official_folder: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    convert(official_folder, tmp_path / "merged", "fp32", adapter=adapter)
    one, two = (load_model(f, weights="widened") for f in (official_folder, tmp_path / "merged"))
    for name, pair in pairs().items():
        parameter = name if name in STACKS else f"{name}.weight"
        expected = one.get_parameter(parameter) + ALPHA / RANK * pair.b @ pair.a
        torch.testing.assert_close(two.get_parameter(parameter), expected, rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(one.layers[0].attn.wkv.weight, two.layers[0].attn.wkv.weight)  # pyright: ignore


def test_peft_s_rules(adapter: Path, tiny_config: ModelConfig) -> None:
    """Patterns of alpha, and rank-stabilized scaling."""
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    name, weight = "layers.1.attn.wq_a.weight", torch.zeros(40, 160)
    plain = Adapter(adapter, tiny_config).apply(name, weight)
    file.write_text(json.dumps(settings | {"alpha_pattern": {"self_attn.q_a_proj": 12.0}}))
    torch.testing.assert_close(Adapter(adapter, tiny_config).apply(name, weight), 2 * plain)
    file.write_text(json.dumps(settings | {"use_rslora": True}))
    torch.testing.assert_close(Adapter(adapter, tiny_config).apply(name, weight), 3**0.5 * plain)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_adapters_that_change_the_base_weight_are_refused(start: str, adapter: Path, tiny_config: ModelConfig) -> None:
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    for harmless in (True, False, None, "gaussian", "eva", "orthogonal"):
        file.write_text(json.dumps(settings | {"init_lora_weights": harmless}))
        assert Adapter(adapter, tiny_config).names
    file.write_text(json.dumps(settings | {"init_lora_weights": start}))
    with pytest.raises(CheckpointError, match=f"'gaussian' or .*; found init_lora_weights '{start}'"):
        Adapter(adapter, tiny_config)


def test_a_config_without_its_scale_is_refused(adapter: Path, tiny_config: ModelConfig) -> None:
    file = adapter / "adapter_config.json"
    for key in ("r", "lora_alpha"):
        settings = json.loads(file.read_text())
        del settings[key]
        file.write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=f"expected a number as {key}; found None"):
            Adapter(adapter, tiny_config)
        file.write_text(json.dumps(settings | {key: 1}))


def test_what_cannot_be_merged_is_refused(
    adapter: Path, official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")

    def refused(changes: dict[str, Any], other: dict[str, torch.Tensor]) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
        save_file(other, adapter / "adapter_model.safetensors")
        with pytest.raises(CheckpointError) as error:
            convert(official_folder, tmp_path / "out", "fp32", adapter=adapter)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "expected use_dora False or None; found use_dora True" in refused({"use_dora": True}, tensors)
    assert "found arrow_config {'top_k': 3}" in refused({"arrow_config": {"top_k": 3}}, tensors)
    assert "found alora_invocation_tokens [7]" in refused({"alora_invocation_tokens": [7]}, tensors)
    assert "found use_qalora True" in refused({"use_qalora": True}, tensors)
    for key, value in (("lora_alpha", None), ("lora_alpha", "16"), ("r", None)):
        assert f"expected a number as {key}; found {value!r}" in refused({key: value}, tensors)
    key = "base_model.model.lm_head.lora_A.weight"
    assert "expected lora_A and lora_B" in refused({}, {k: t for k, t in tensors.items() if k != key})
    assert "found an adapter of [67, 8]" in refused({}, tensors | {key: tensors[key][:, :8].contiguous()})
    strange = {k.replace("lm_head", "lm_tail"): t for k, t in tensors.items()}
    assert "'lm_tail': expected matrices of the model" in refused({}, strange)
    assert "PEFT; found shape [3]" in refused({}, tensors | {"vector": torch.ones(3)})
    words = [str(official_folder), str(tmp_path / "x.gguf"), "--format", "gguf", "--adapter", str(adapter)]
    assert main(["convert", *words]) == 2
    assert "--adapter is not allowed with --format gguf" in capsys.readouterr().err


def test_the_command_merges_and_prints_the_rounding(
    adapter: Path, official_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(official_folder), str(tmp_path / "merged"), "--format", "official", "--adapter", str(adapter)]
    assert main(["convert", *words]) == 0
    assert "rounded 15 tensors of routed" in capsys.readouterr().out
    assert load_model(tmp_path / "merged").config.vocab_size == 67


# PEFT looks for a pattern's targets among modules alone, not parameters, and calls transformers by older names.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
def test_peft_computes_the_merged_model(adapter: Path, official_folder: Path, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    convert(official_folder, tmp_path / "hf", "transformers")
    convert(official_folder, tmp_path / "merged", "fp32", adapter=adapter)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, 67, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = model(ids).logits
        theirs = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
    ours = load_model(tmp_path / "merged")(ids)
    assert float((ours - base).abs().max()) > 0.1 * float(base.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(base.abs().max()))
