"""One table of parameters: every parameter of every published shape has exactly one row, and a stored format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.analysis.inventory import tensor_inventory
from dsv4.config import ModelConfig
from dsv4.model.parameters import TABLE, matrix_shapes, module_name, row_of, stored_dtype
from dsv4.model.stacks import native_tensors, official_tensors
from dsv4.model.transformer import Transformer

from .tiny import random_model, tiny_config


@pytest.mark.parametrize("preset", ["nano", "flash", "pro"])
def test_every_parameter_has_exactly_one_row_and_its_stored_format(preset: str) -> None:
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        model = Transformer(config)
    stored = {module_name(spec.name)[0]: spec.dtype for spec in tensor_inventory(config, "official")}
    used = set()
    for name, parameter in model.named_parameters():
        used.add(row_of(name))  # ValueError unless exactly one row matches
        assert stored_dtype(name) == stored[name], name
        if row_of(name).optimizer == "muon":
            shapes = matrix_shapes(name, tuple(parameter.shape), config)
            assert sum(rows * columns for rows, columns in shapes) == parameter.numel(), name
    assert used == set(TABLE), "a row that no parameter has"


@pytest.mark.parametrize("name", ["layers.0.attn.wq_c.weight", "layers.0.ffn.experts.0.w1.weight", "embed.bias", "wkv"])
def test_an_unknown_parameter_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"^0 rows of dsv4/model/parameters.py are of a parameter named"):
        row_of(name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layers.0.ffn.experts.w2", "I8"),
        ("mtp.0.ffn.experts.w1", "I8"),
        ("layers.0.ffn.shared_experts.w1.weight", "F8_E4M3"),
        ("layers.2.attn.wq_b.weight", "F8_E4M3"),
        ("layers.2.attn.wo_a.weight", "F8_E4M3"),
        ("layers.2.attn.indexer.wq_b.weight", "F8_E4M3"),
        ("mtp.0.e_proj.weight", "F8_E4M3"),
        ("layers.2.attn.compressor.wkv.weight", "BF16"),
        ("layers.2.attn.indexer.compressor.wkv.weight", "BF16"),
        ("layers.2.attn.indexer.weights_proj.weight", "BF16"),
        ("layers.2.attn.compressor.ape", "F32"),
        ("layers.0.ffn.gate.weight", "BF16"),
        ("embed.weight", "BF16"),
        ("mtp.0.norm.weight", "BF16"),
    ],
)
def test_official_layout_decides_the_format(name: str, dtype: str) -> None:
    assert stored_dtype(name) == dtype


def test_official_tensors_are_views_in_the_order_of_the_checkpoint() -> None:
    model = random_model(tiny_config())
    tensors = native_tensors(model)
    names = [spec.name for spec in tensor_inventory(model.config, "fp32")]
    assert sorted(tensors) == sorted(names)
    experts = [name for name in tensors if ".experts." in name]
    assert experts == [name for name in names if ".experts." in name]
    for name, tensor in tensors.items():
        target, number = module_name(name)
        whole = model.state_dict()[target]
        assert tensor.data_ptr() == (whole if number is None else whole[number]).data_ptr(), name
    assert official_tensors(tensors) == tensors, "official names stay"


def test_the_table_needs_no_torch() -> None:
    source = (Path(__file__).parents[2] / "dsv4" / "model" / "parameters.py").read_text(encoding="utf-8")
    assert "import torch" not in source and "from torch" not in source
