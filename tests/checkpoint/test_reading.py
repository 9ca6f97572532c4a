"""Every layout is read to the independent writer's values; memory holds one tensor beside the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from dsv4.analysis import tensor_inventory
from dsv4.checkpoint import iter_float_tensors, load_model, names, read_config, save_model
from dsv4.checkpoint.mapped import mapped_files
from dsv4.config import ModelConfig
from dsv4.kernels.backends import stored_as_widened
from dsv4.kernels.stored import StoredStack, StoredTensor, StoredWeight
from dsv4.model.stacks import official_tensors

LAYOUTS = ["official", "official-base", "bf16", "fp32"]


def assert_same(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    state = official_tensors(model.state_dict())
    assert state.keys() == values.keys()
    for name, value in values.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [0, 3])
def test_every_layout_is_read_to_the_same_values(
    layout: str, shards: int, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    expert_dtype = "fp8" if layout == "official-base" else "fp4"
    source = tiny(replace(tiny_config, expert_dtype=expert_dtype), layout, seed=1)
    folder = source.write(tmp_path / "model", shards)
    model = load_model(folder)
    assert_same(model, source.values)
    assert model.config == source.config and not model.training
    assert {name: tensor.clone() for name, tensor in iter_float_tensors(folder)}.keys() == source.values.keys()


def test_inventory_and_model_name_the_published_tensors(tiny: Any, tiny_config: ModelConfig) -> None:
    for layout in LAYOUTS:
        stored = tiny(tiny_config, layout).stored
        dtypes = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.int8: "I8"}
        dtypes |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"}
        expected = {name: (tuple(tensor.shape), dtypes[tensor.dtype]) for name, tensor in stored.items()}
        specs = {spec.name: (spec.shape, spec.dtype) for spec in tensor_inventory(tiny_config, layout)}  # type: ignore[arg-type]
        assert specs == expected


def test_bf16_model_keeps_float32_where_the_official_layout_does(official: Any, official_folder: Path) -> None:
    model = load_model(official_folder, dtype=torch.bfloat16)
    for name, tensor in official_tensors(model.state_dict()).items():
        kept = tensor.dim() == 1 or "hc_" in name or name.endswith("ape")
        expected = torch.int64 if name.endswith("tid2eid") else torch.float32 if kept else torch.bfloat16
        assert tensor.dtype == expected, name
        assert torch.equal(tensor, official.values[name].to(expected)), name


def test_a_loaded_model_is_frozen_until_asked(official_folder: Path) -> None:
    """Integer tables are not parameters, and the router's bias takes no gradient even if everything is unfrozen."""
    model = load_model(official_folder)
    assert model.layers[0].ffn.gate.tid2eid.dtype == torch.int64
    assert "layers.0.ffn.gate.tid2eid" not in dict(model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None and not name.startswith("mtp.")}
    biases = {f"layers.{i}.ffn.gate.bias" for i in (1, 2, 3)}
    assert biases <= untouched and "layers.0.attn.wq_a.weight" not in untouched


def test_the_loaded_model_does_not_live_in_the_file(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Training a loaded model must not change the checkpoint, nor a change of the checkpoint the model."""
    source = tiny(tiny_config, "fp32")
    folder = source.write(tmp_path / "model")
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(load_model(folder), source.values)


def test_base_duplicates_of_embedding_and_head_are_ignored(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    source = tiny(replace(tiny_config, expert_dtype="fp8"), "official-base")
    source.stored["mtp.0.emb.tok_emb.weight"] = source.stored["embed.weight"].clone()
    source.stored["mtp.0.head.weight"] = source.stored["head.weight"].clone()
    assert_same(load_model(source.write(tmp_path / "model")), source.values)


def test_fp8_experts_with_e8m0_scales_are_read(
    tiny: Any, tiny_config: ModelConfig, oracle: Any, tmp_path: Path
) -> None:
    """As DeepSeek's own converter writes FP4 experts: FP8 throughout, scales still E8M0."""
    source = tiny(tiny_config, "official")
    for name in [name for name in source.values if ".experts." in name]:
        codes, scales = oracle.fp8(source.values[name].double().numpy())
        source.stored[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        source.stored[name.removesuffix("weight") + "scale"] = torch.from_numpy(scales).view(torch.float8_e8m0fnu)
        source.values[name] = torch.from_numpy(oracle.read_fp8(codes, 2.0 ** (scales.astype(float) - 127))).float()
    assert_same(load_model(source.write(tmp_path / "model")), source.values)


@pytest.mark.parametrize("style", ["prefix", "modules", "v3"])
def test_other_spellings_of_the_names_are_read(
    style: str, official: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """`model.` before official names; V3-like names; transformers' module names with all experts of a layer merged."""
    source = tiny(tiny_config, "fp32" if style == "modules" else "official")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in source.stored.items():
        if style == "v3":
            name = (
                name.replace(".attn.", ".self_attn.")
                .replace(".ffn.", ".mlp.")
                .replace("gate.bias", "gate.e_score_correction_bias")
            )
            name = name.removesuffix(".scale") + ".weight_scale_inv" if name.endswith(".scale") else name
        stored[f"model.{name}"] = tensor
    if style == "modules":
        stored = merge_experts(source.stored, tiny_config)
    source.stored = stored
    assert_same(load_model(source.write(tmp_path / "model")), source.values)


def merge_experts(stored: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    merged = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for prefix in [*(f"layers.{i}" for i in range(config.num_hidden_layers)), "mtp.0"]:
        experts = [
            [stored[f"{prefix}.ffn.experts.{e}.w{i}.weight"] for i in (1, 2, 3)] for e in range(config.n_routed_experts)
        ]
        merged[f"model.{prefix}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([w1, w3]) for w1, _, w3 in experts])
        merged[f"model.{prefix}.mlp.experts.down_proj"] = torch.stack([w2 for _, w2, _ in experts])
    return merged


def test_official_names_are_their_own_official_spelling(tiny_config: ModelConfig) -> None:
    specs = list(tensor_inventory(tiny_config))
    assert [names.to_official(spec.name) for spec in specs] == [spec.name for spec in specs]
    assert [names.to_official(names.to_transformers(spec.name)) for spec in specs] == [spec.name for spec in specs]


def test_read_config_gives_the_folder_s_config(official: Any, official_folder: Path) -> None:
    assert read_config(official_folder) == official.config


def test_mtp_is_expected_unless_transformers_dropped_it(
    official: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    source = tiny(tiny_config, "fp32")
    source.stored = {f"model.{name}": tensor for name, tensor in source.stored.items() if not name.startswith("mtp.")}
    folder = source.write(tmp_path / "model")
    config = replace(tiny_config, num_nextn_predict_layers=0, compress_ratios=tiny_config.compress_ratios[:-1])
    assert read_config(folder) == config
    model = load_model(folder)
    assert model.config == config and len(model.mtp) == 0
    assert_same(model, {name: value for name, value in source.values.items() if not name.startswith("mtp.")})


def peak_bytes(work: Callable[[], object], mapped: set[int]) -> int:
    """Peak bytes that torch's CPU allocator held during `work`, without mapped files, which have the sizes `mapped`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    assert kept is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert mapped <= set(changes)
    return max(accumulate(change for change in changes if abs(change) not in mapped))


@pytest.mark.parametrize("layout", ["official", "official-base", "bf16"])
def test_peak_memory_is_the_model_and_one_tensor(
    layout: str, tiny: Any, tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4.checkpoint import formats

    monkeypatch.setattr(formats, "_STRIP_ELEMENTS", 256)  # strips are small beside the tensors of a real model
    folder = tiny(tiny_config, layout).write(tmp_path / "model")
    model = load_model(folder, weights="widened")
    sizes = [tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()]
    assert max(sizes) < sum(sizes) / 10
    mapped = {file.stat().st_size for file in folder.glob("*.safetensors")}
    peak = peak_bytes(lambda: load_model(folder, weights="widened"), mapped)
    assert sum(sizes) <= peak <= sum(sizes) + 1.3 * max(sizes)
    # As stored, all matrices stay in the mapped files.
    official = load_model(folder, weights="stored")
    matrices = sum(p.stored_bytes for p in official.parameters() if isinstance(p, StoredWeight))
    others = sum(p.nbytes for p in official.state_dict().values() if not isinstance(p, StoredWeight))
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert matrices + others <= 1.15 * stored
    assert peak_bytes(lambda: load_model(folder, weights="stored"), mapped) <= 1.1 * others + max(sizes) / 2


def test_index_without_total_size_and_single_file_without_metadata(official: Any, official_folder: Path) -> None:
    index = official_folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]
    index.write_text(json.dumps(content))
    assert_same(load_model(official_folder), official.values)
    for file in official_folder.glob("*.safetensors"):
        save_file(load_file(file), file)
    assert_same(load_model(official_folder), official.values)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_on_cuda(layout: str, tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Codes are dequantized on the device; saving from there reproduces the stored tensors."""
    source = tiny(tiny_config, layout, seed=1)
    folder = source.write(tmp_path / "model")
    model = load_model(folder, device="cuda")
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    assert_same(model.cpu(), source.values)
    save_model(load_model(folder, device="cuda"), tiny_config, tmp_path / "again", layout)  # type: ignore[arg-type]
    for name, tensor in load_file(tmp_path / "again" / "model-00001-of-00001.safetensors").items():
        assert torch.equal(tensor.view(torch.uint8), source.stored[name].view(torch.uint8)), name


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_a_folder_of_the_published_shape_opens(preset: str, tmp_path: Path) -> None:
    """All tensors of Flash and Pro, in sparse files: checked in seconds; one tensor in the middle is read."""
    from dsv4.checkpoint.files import ShardWriter
    from dsv4.checkpoint.folder import Checkpoint

    config = ModelConfig.preset(preset)
    specs = list(tensor_inventory(config))
    weight_map: dict[str, str] = {}
    for number in range(64):
        part, file = specs[number::64], f"model-{number + 1:05d}-of-00064.safetensors"
        writer = ShardWriter(tmp_path / file, part)
        with writer._handle as handle:
            handle.truncate(writer._start + sum(spec.num_bytes for spec in part))
        weight_map |= {spec.name: file for spec in part}
    total = sum(spec.num_bytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with Checkpoint(tmp_path) as checkpoint:
        weight = checkpoint.parameter("layers.20.ffn.experts.7.w1.weight")
    assert weight.shape == (config.moe_intermediate_size, config.hidden_size) and not weight.any()


def stacks_of(model: torch.nn.Module) -> list[StoredStack]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, StoredStack)]


def test_stored_experts_are_a_stack_of_views_of_the_mapped_files(official_folder: Path) -> None:
    """Neither codes nor scales are copied."""
    model = load_model(official_folder, weights="stored")
    files, stacks = mapped_files(model), stacks_of(model)
    assert files is not None and len(stacks) == 3 * (model.config.num_hidden_layers + 1)
    parts = [part for stack in stacks for matrix in stack.matrices for part in (matrix.codes, matrix.scales)]  # type: ignore[attr-defined]
    assert len(parts) == 2 * model.config.n_routed_experts * len(stacks)
    if files.ranges:  # the system lists mappings
        assert all(any(known.first <= part.data_ptr() < known.last for known in files.ranges) for part in parts)


def test_a_stack_of_experts_stored_in_several_dtypes(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Matrices in dtypes that the kernels read stay as stored, the others are float32 beside them."""
    source, name = tiny(tiny_config, "bf16"), "layers.1.ffn.experts.{}.w1.weight"
    for number, dtype in ((0, torch.float32), (3, torch.float16)):
        source.stored[name.format(number)] = source.stored[name.format(number)].to(dtype)
    folder = source.write(tmp_path / "model")
    model, wide = load_model(folder, weights="stored"), load_model(folder, weights="widened")
    stack = model.get_parameter("layers.1.ffn.experts.w1")
    assert isinstance(stack, StoredStack)
    assert [isinstance(matrix, StoredTensor) for matrix in stack.matrices] == [False, True, True, False, True]
    assert torch.equal(stack, wide.get_parameter("layers.1.ffn.experts.w1"))
    ids = torch.arange(40)[None] % tiny_config.vocab_size
    with torch.no_grad():
        got, want = model(ids), wide(ids)
    assert torch.equal(got, want) if stored_as_widened() else torch.allclose(got, want, rtol=0.0, atol=2e-4)
    save_model(model, model.config, tmp_path / "again", "fp32")
    assert_same(
        load_model(tmp_path / "again", weights="widened"),
        {n: v.float() if v.is_floating_point() else v for n, v in source.values.items()},
    )
