"""No conversion changes a value unless allowed to; then it reports the error."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.checkpoint import CheckpointError, convert, iter_float_tensors
from dsv4.checkpoint.gguf_export import export_gguf
from dsv4.cli import main
from dsv4.config import ModelConfig

# (layout of the source, target format that cannot hold the values of random weights in that layout).
LOSSY = [
    ("official-base", "official"),
    ("official-base", "bf16"),
    ("bf16", "official"),
    ("bf16", "official-base"),
    ("fp32", "official"),
    ("fp32", "official-base"),
    ("fp32", "bf16"),
]


def write(tiny: Any, config: ModelConfig, layout: str, folder: Path) -> Any:
    source = tiny(replace(config, expert_dtype="fp8" if layout == "official-base" else "fp4"), layout, seed=3)
    source.write(folder)
    return source


@pytest.mark.parametrize(("layout", "format"), LOSSY)
def test_rounding_must_be_allowed_and_is_measured(
    layout: str, format: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    source = write(tiny, tiny_config, layout, tmp_path / "model")
    refused = (
        r"expected values with an exact .* form \(or --allow-rounding; in Python allow_rounding=True\); found .*RMS"
    )
    with pytest.raises(CheckpointError, match=refused):
        convert(tmp_path / "model", tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    errors = convert(tmp_path / "model", tmp_path / "out", format, allow_rounding=True)
    written = {name: tensor.clone() for name, tensor in iter_float_tensors(tmp_path / "out")}
    experts = [name for name in source.values if ".experts." in name]
    before = torch.cat([source.values[name].double().flatten() for name in experts])
    after = torch.cat([written[name].double().flatten() for name in experts])
    error = errors["routed_experts"]
    assert error.tensors == len(experts)
    assert error.relative_rms == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    assert error.worst == pytest.approx(float((after - before).abs().max()), rel=1e-6)
    worst = source.values[error.worst_tensor].double() - written[error.worst_tensor].double()
    assert float(worst.abs().max()) == pytest.approx(error.worst, rel=1e-6)
    assert error.largest == pytest.approx(float(before.abs().max()))
    assert ("norms" in errors) == (layout == "fp32"), "BF16 norms are copied"


@pytest.mark.parametrize(
    ("layout", "format"), [("official", "official-base"), ("official-base", "fp32"), ("bf16", "fp32")]
)
def test_an_exact_conversion_needs_no_flag_and_reports_nothing(
    layout: str, format: Any, tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    write(tiny, tiny_config, layout, tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path / "out", format) == {}
    assert convert(tmp_path / "out", tmp_path / "again", format, allow_rounding=True) == {}


def test_fp4_too_far_apart_for_fp8_rounds_if_allowed(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    source = tiny(tiny_config, "official")
    name = "layers.2.ffn.experts.3.w2."
    source.stored[name + "scale"].view(torch.uint8)[0, :2] = torch.tensor([160, 60])
    source.stored[name + "weight"][0] = 0x17
    folder = source.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"exact FP8 form \(or --allow-rounding.*2\^14"):
        convert(folder, tmp_path / "out", "official-base")
    errors = convert(folder, tmp_path / "out", "official-base", allow_rounding=True)
    assert errors["routed_experts"].tensors == 1 and errors["routed_experts"].worst_tensor == name + "weight"


def test_one_wide_tensor_makes_transformers_format_float32(tiny: Any, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """A folder of BF16 experts and a float32 norm lost the norm's last bits in silence."""
    source = tiny(tiny_config, "bf16", seed=3)
    source.stored["norm.weight"] = torch.linspace(0.1, 1.3, 160)
    source.values["norm.weight"] = source.stored["norm.weight"]
    folder = source.write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="tensor 'norm.weight': expected values with an exact BF16 form"):
        convert(folder, tmp_path / "out", "bf16")
    convert(folder, tmp_path / "out", "transformers")
    for name, tensor in iter_float_tensors(tmp_path / "out"):
        if not name.startswith("mtp."):
            assert torch.equal(tensor.to(source.values[name].dtype), source.values[name]), name


def test_gguf_rounds_only_if_allowed_and_reports_the_errors(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    write(tiny, tiny_config, "official-base", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    file = tmp_path / "model.gguf"
    assert export_gguf(tmp_path / "model", file) == {}
    with pytest.raises(CheckpointError, match=r"exact BF16 form \(or --allow-rounding"):
        export_gguf(tmp_path / "model", file, linears="bf16", overwrite=True)
    bf16 = export_gguf(tmp_path / "model", file, linears="bf16", overwrite=True, allow_rounding=True)
    q8_0 = export_gguf(tmp_path / "model", file, linears="q8_0", overwrite=True, allow_rounding=True)
    assert 1e-4 < bf16["routed_experts"].relative_rms < 3e-3 < q8_0["routed_experts"].relative_rms < 2e-2


def test_the_command_prints_the_errors(
    tiny: Any, tiny_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tiny, tiny_config, "official-base", tmp_path / "model")
    command = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "official"]
    assert main(command) == 2
    assert "--allow-rounding" in capsys.readouterr().err
    assert main([*command, "--allow-rounding"]) == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"[0-9.]+e[+-]\d\d"
    pattern = rf"rounded 75 tensors of routed_experts: relative RMS {number}, worst {number}.*{number}, in layers\..*"
    assert any(re.fullmatch(pattern, line) for line in lines), lines
