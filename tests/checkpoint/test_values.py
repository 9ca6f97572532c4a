"""A non-finite value is named at load and in every conversion: tensor, file, index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4.checkpoint import FORMATS, CheckpointError, convert, iter_float_tensors, load_model, save_model
from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.checkpoint.values import first_not_finite
from dsv4.cli import main
from dsv4.config import ModelConfig

NAN, INF = float("nan"), float("inf")
# (layout, tensor, index, value; an int is a code) of every kind of tensor and every format that has a NaN or infinity.
WRONG = [
    ("official", "layers.0.attn.wq_a.weight", [3, 7], 0x7F),
    ("official", "layers.1.ffn.shared_experts.w2.weight", [159, 47], 0xFF),
    ("official", "layers.1.ffn.shared_experts.w1.scale", [0, 1], 255),
    ("official", "layers.2.ffn.experts.3.w1.scale", [47, 4], 255),
    ("official", "mtp.0.e_proj.scale", [1, 1], 255),
    ("official", "layers.1.attn_norm.weight", [9], NAN),
    ("official", "layers.1.attn.indexer.weights_proj.weight", [1, 2], NAN),
    ("official", "layers.1.attn.compressor.ape", [3, 63], -INF),
    ("official", "layers.0.attn.attn_sink", [0], INF),
    ("official", "layers.3.ffn.gate.bias", [4], NAN),
    ("official", "hc_head_fn", [3, 0], NAN),
    ("official", "head.weight", [66, 159], -INF),
    ("official", "embed.weight", [0, 0], NAN),
    ("official-base", "layers.2.ffn.experts.3.w1.scale", [0, 1], NAN),
    ("official-base", "layers.2.ffn.experts.3.w1.weight", [1, 5], 0x7F),
    ("bf16", "layers.2.ffn.experts.3.w1.weight", [47, 159], INF),
    ("fp32", "layers.2.ffn.experts.3.w1.weight", [2, 3], -NAN),
]
IDS = [f"{layout}-{name}" for layout, name, *_ in WRONG]


def spoil(source: Any, name: str, index: list[int], value: float) -> None:
    tensor = source.stored[name] = source.stored[name].clone()
    if isinstance(value, int):
        tensor.view(torch.uint8)[tuple(index)] = value
    else:
        tensor[tuple(index)] = value


def make(tiny: Any, config: ModelConfig, layout: str, folder: Path, *spoilt: Any) -> Path:
    source = tiny(replace(config, expert_dtype="fp8" if layout == "official-base" else "fp4"), layout)
    spoil(source, *spoilt)
    source.write(folder)
    (folder / "tokenizer.json").unlink()  # the fixture's is a stub
    return folder


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def refuses(work: Any, folder: Path, name: str, index: list[int]) -> None:
    with pytest.raises(CheckpointError) as raised:
        work()
    error = raised.value
    assert (error.file, error.tensor, error.expected) == (shard_of(folder, name), name, "finite numbers")
    assert f" at {index}" in error.found


@pytest.mark.parametrize(("layout", "name", "index", "value"), WRONG, ids=IDS)
def test_loading_names_tensor_and_index(
    layout: str, name: str, index: list[int], value: float, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    folder = make(tiny, tiny_config, layout, tmp_path / "model", name, index, value)
    for weights in (None, "widened"):
        refuses(lambda weights=weights: load_model(folder, weights=weights), folder, name, index)
        load_model(folder, weights=weights, check_values=False)
    refuses(lambda: list(iter_float_tensors(folder)), folder, name, index)
    assert len(list(iter_float_tensors(folder, check_values=False))) > 100


@pytest.mark.parametrize("format", [*FORMATS, "gguf"])
def test_converting_refuses_in_every_direction(
    format: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    for number, (layout, name, index, value) in enumerate(WRONG):
        folder = make(tiny, tiny_config, layout, tmp_path / f"model{number}", name, index, value)
        target = tmp_path / f"out.{format}"

        def work(folder: Path = folder, name: str = name, target: Path = target) -> None:
            if format == "gguf":
                export_gguf(folder, target, mtp=name.startswith("mtp."), allow_rounding=True)
            else:
                convert(folder, target, format, allow_rounding=True)

        refuses(work, folder, name, index)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_a_value_in_a_merged_tensor_of_transformers_is_named(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """The index is that of the stored tensor, [experts, 2 * width, hidden]."""
    source = tiny(tiny_config, "bf16")
    experts = [f"layers.1.ffn.experts.{e}." for e in range(5)]
    merged = torch.stack(
        [torch.cat([source.stored.pop(e + "w1.weight"), source.stored.pop(e + "w3.weight")]) for e in experts]
    )
    merged[3, 48 + 2, 7] = NAN
    name = "model.layers.1.mlp.experts.gate_up_proj"
    source.stored[name] = merged
    folder = source.write(tmp_path / "model")
    refuses(lambda: load_model(folder), folder, name, [3, 50, 7])


@pytest.mark.parametrize(
    ("layout", "name", "scale", "codes"),
    [
        ("official", "layers.0.attn.wq_a.weight", 127 + 121, None),
        ("official", "layers.2.ffn.experts.3.w1.weight", 127 + 127, 0x77),
        ("official-base", "layers.0.attn.wq_a.weight", 3e38, None),
    ],
)
def test_products_beyond_float32_are_refused(
    layout: str, name: str, scale: float, codes: int | None, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    source = tiny(tiny_config, layout)
    if codes is not None:
        source.stored[name] = source.stored[name].clone()
        source.stored[name].view(torch.uint8)[4, 3] = codes
    spoil(source, name.replace("weight", "scale"), [4 if codes else 0, 0], scale)
    folder = source.write(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"expected codes whose products with .* stay within float32; found .* at \["
    ) as raised:
        load_model(folder)
    assert raised.value.tensor == name


def test_a_large_scale_alone_is_no_error(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Only the product can overflow: with codes of zero the largest scale is valid."""
    source = tiny(tiny_config, "official")
    name = "layers.2.ffn.experts.3.w1.weight"
    source.stored[name] = torch.zeros_like(source.stored[name])
    spoil(source, name.replace("weight", "scale"), [0, 0], 254)
    load_model(source.write(tmp_path / "model"))


def test_values_that_the_model_s_dtype_cannot_hold_are_refused(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    source = tiny(tiny_config, "fp32")
    spoil(source, "layers.0.attn.wq_a.weight", [0, 0], 1e5)
    folder = source.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"wq_a.*expected values that torch.float16 can hold"):
        load_model(folder, dtype=torch.float16)
    load_model(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["norm.weight", "layers.0.attn.attn_sink", "layers.0.attn.wq_a.weight"])
def test_saving_refuses_non_finite_values(value: float, name: str, official: Any, tmp_path: Path) -> None:
    for format in FORMATS:
        tensors = dict(official.values)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[5 % tensors[name].numel()] = value
        with pytest.raises(CheckpointError, match=f"tensor '{name}'"):
            save_model(tensors, official.config, tmp_path / "model", format)
        assert not list(tmp_path.iterdir())


def test_saving_names_values_that_bf16_cannot_hold(official: Any, tmp_path: Path) -> None:
    """Finite as float32, infinite once rounded."""
    tensors = {**official.values, "norm.weight": torch.full((160,), 3.4e38)}
    with pytest.raises(CheckpointError, match=r"norm.weight': expected finite numbers that BF16 can hold; found 3.39"):
        save_model(tensors, official.config, tmp_path / "model", "bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_bit_pattern_is_judged_as_by_torch(dtype: torch.dtype) -> None:
    """All patterns of 8 and 16 bits, and those around every limit of 32 bits, at any position relative to chunks."""
    if dtype.itemsize == 4:
        limits = np.array([0, 0x7F80_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFF80_0000, 0xFFFF_FFFF], dtype=np.int64)
        bits = (limits[:, None] + np.arange(-2, 3)).ravel() & 0xFFFF_FFFF
        patterns = torch.from_numpy(bits.astype(np.uint32).view(np.int32)).view(dtype)
    else:
        unsigned = np.uint8 if dtype.itemsize == 1 else np.uint16
        patterns = torch.from_numpy(
            np.arange(1 << 8 * dtype.itemsize).astype(unsigned).view(f"i{dtype.itemsize}")
        ).view(dtype)
    finite = patterns.float().isfinite()
    assert finite.any() and not finite.all()
    assert first_not_finite(patterns[finite]) is None
    for pattern in patterns[~finite][:: max(1, int((~finite).sum()) // 40)]:
        for place in (0, 70_000, (1 << 19) - 1, 1 << 19, 600_000):
            tensor = torch.zeros(600_001).to(dtype)
            tensor[place] = pattern
            assert first_not_finite(tensor) == place


def test_the_nan_of_e8m0_is_found_and_integers_have_none() -> None:
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e8m0fnu)
    assert first_not_finite(scales) == 255 and first_not_finite(scales[:255]) is None
    assert first_not_finite(torch.tensor([-1, 127], dtype=torch.int8)) is None
    assert first_not_finite(torch.empty(0, 3)) is None


def test_the_command_line_skips_the_check_when_asked(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv4.config import nano_path

    for file in nano_path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["mtp.0.norm.weight"][0] = NAN  # a tensor that generation does not need
    save_file(tensors, file, metadata={"format": "pt"})
    command = ["generate", "--model", str(tmp_path), "1, 2,", "--max-tokens", "2", "--temperature", "0"]
    assert main(command) == 2
    assert "tensor 'mtp.0.norm.weight': expected finite numbers; found nan at [0]" in capsys.readouterr().err
    assert main([*command, "--skip-weight-check"]) == 0
