"""Tensor names, shapes, dtypes and bytes against the published files (their listings)."""

from collections import Counter
from dataclasses import replace

import pytest

from dsv4.analysis import TensorSpec, checkpoint_bytes, tensor_inventory
from dsv4.config import ModelConfig

BY_DTYPE = {
    "flash": {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792},
    "pro": {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424},
}
BYTES = {
    "flash": 159_609_485_896,
    "pro": 864_704_792_696,
    "flash-base": 292_555_345_480,
    "pro-base": 1_602_325_824_632,
}


def inventory(name: str) -> list[TensorSpec]:
    return list(tensor_inventory(ModelConfig.preset(name)))


@pytest.mark.parametrize(
    ("name", "tensors", "scales"), [("flash", 69_187, 8_858_737_664), ("pro", 145_116, 49_150_268_416)]
)
def test_tensors_dtypes_and_scales_add_up_to_the_published_totals(name: str, tensors: int, scales: int) -> None:
    specs = inventory(name)
    assert len(specs) == len({spec.name for spec in specs}) == tensors
    assert dict(Counter(spec.dtype for spec in specs)) == BY_DTYPE[name]
    assert sum(spec.num_bytes for spec in specs if spec.component == "scale") == scales


@pytest.mark.parametrize("name", BYTES)
def test_checkpoint_bytes_are_those_of_the_published_files(name: str) -> None:
    assert checkpoint_bytes(ModelConfig.preset(name)) == BYTES[name]


def test_tensors_and_bytes_of_flash_s_mtp_block() -> None:
    mtp = [spec for spec in inventory("flash") if spec.name.startswith("mtp.0.")]
    assert (len(mtp), sum(spec.num_bytes for spec in mtp)) == (1_575, 3_593_787_756)


def test_names_shapes_and_dtypes_of_flash() -> None:
    specs = {spec.name: (spec.shape, spec.dtype) for spec in inventory("flash")}
    assert specs["embed.weight"] == specs["head.weight"] == ((129280, 4096), "BF16")
    assert specs["hc_head_fn"] == ((4, 16384), "F32")
    assert specs["layers.7.hc_attn_fn"] == specs["layers.7.hc_ffn_fn"] == ((24, 16384), "F32")
    assert specs["layers.7.hc_ffn_scale"] == ((3,), "F32")
    assert specs["layers.0.attn.attn_sink"] == ((64,), "F32")
    assert specs["layers.0.attn.wq_b.weight"] == ((32768, 1024), "F8_E4M3")
    assert specs["layers.0.attn.wq_b.scale"] == ((256, 8), "F8_E8M0")
    assert specs["layers.0.attn.wo_a.weight"] == ((8192, 4096), "F8_E4M3")
    assert specs["layers.2.attn.compressor.ape"] == ((4, 1024), "F32")
    assert specs["layers.3.attn.compressor.ape"] == ((128, 512), "F32")
    assert specs["layers.3.attn.compressor.wkv.weight"] == ((512, 4096), "BF16")
    assert specs["layers.2.attn.indexer.wq_b.weight"] == ((8192, 1024), "F8_E4M3")
    assert specs["layers.2.attn.indexer.weights_proj.weight"] == ((64, 4096), "BF16")
    assert specs["layers.2.attn.indexer.compressor.norm.weight"] == ((128,), "BF16")
    assert specs["layers.2.ffn.gate.tid2eid"] == ((129280, 6), "I64")
    assert specs["layers.3.ffn.gate.bias"] == specs["mtp.0.ffn.gate.bias"] == ((256,), "F32")
    assert specs["layers.9.ffn.experts.255.w1.weight"] == ((2048, 2048), "I8")
    assert specs["layers.9.ffn.experts.255.w2.weight"] == ((4096, 1024), "I8")
    assert specs["layers.9.ffn.experts.255.w2.scale"] == ((4096, 64), "F8_E8M0")
    assert specs["layers.9.ffn.shared_experts.w2.scale"] == ((32, 16), "F8_E8M0")
    assert specs["mtp.0.e_proj.scale"] == ((32, 32), "F8_E8M0")
    for absent in (
        "layers.0.attn.compressor.ape",
        "layers.3.attn.indexer.wq_b.weight",
        "layers.2.ffn.gate.bias",
        "layers.3.ffn.gate.tid2eid",
        "mtp.0.attn.compressor.ape",
        "mtp.0.emb.tok_emb.weight",
    ):
        assert absent not in specs


def test_base_stores_fp8_experts_and_f32_scales() -> None:
    specs = {spec.name: spec for spec in inventory("flash-base")}
    assert specs["layers.9.ffn.experts.0.w1.weight"][1:3] == ((2048, 4096), "F8_E4M3")
    assert specs["layers.9.ffn.experts.0.w1.scale"][1:3] == ((16, 32), "F32")
    assert not any(spec.dtype == "F8_E8M0" for spec in specs.values())


def test_plain_layouts_have_no_scales_and_round_up_odd_sizes() -> None:
    config = ModelConfig.preset("nano")
    for layout, dtypes in (("bf16", {"BF16", "F32", "I64"}), ("fp32", {"F32", "I64"})):
        specs = list(tensor_inventory(config, layout))
        assert {spec.dtype for spec in specs} == dtypes
        assert not any(spec.name.endswith(".scale") for spec in specs)
    odd = replace(config, q_lora_rank=129)
    specs = {spec.name: spec.shape for spec in tensor_inventory(odd)}
    assert specs["layers.0.attn.wq_a.scale"] == (2, 2)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout 'gguf' is unknown; allowed: official, official-base, bf16, fp32"):
        list(tensor_inventory(ModelConfig.preset("nano"), "gguf"))  # type: ignore[arg-type]
