"""Folders with a draft model beside the main model, as DSpark's of July and August, or without the MTP block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dsv4.analysis import tensor_inventory
from dsv4.checkpoint import CheckpointError, convert, load_model, read_config
from dsv4.checkpoint.names import is_draft
from dsv4.cli import main
from dsv4.config import ModelConfig
from dsv4.model.stacks import official_tensors

from .test_failures import INDEX, edit_index, rewrite, shard_of

DSPARK_KEYS = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 3,
    "dspark_target_layer_ids": [1, 2, 3],
    "dspark_markov_rank": 8,
}
# Tensors of a DSpark checkpoint besides three blocks of V4's parts without e_proj, h_proj, enorm and hnorm.
DSPARK_TENSORS = (
    *("mtp.0.main_proj.weight", "mtp.0.main_proj.scale", "mtp.0.main_norm.weight"),
    *("mtp.2.norm.weight", "mtp.2.hc_head_fn", "mtp.2.hc_head_base", "mtp.2.hc_head_scale"),
    *("mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w2.weight", "mtp.2.confidence_head.proj.weight"),
)
MTP_ONLY = ("e_proj.", "h_proj.", "enorm.", "hnorm.", "norm.", "hc_head_")


def block_names(mtp_names: list[str]) -> list[str]:
    """Names of mtp.0 without the parts that only V4's MTP block has."""
    return [name for name in mtp_names if not name.removeprefix("mtp.0.").startswith(MTP_ONLY)]


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add_shard(folder: Path, names: list[str]) -> None:
    """Add a shard with small tensors of these names."""
    file = "model-draft.safetensors"
    save_file({name: torch.zeros(2, 3) for name in names}, folder / file)
    edit_index(folder, lambda content: content["weight_map"].update(dict.fromkeys(names, file)))


def drop_mtp(folder: Path) -> None:
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    for shard in set(listed.values()):
        rewrite(folder / shard, lambda tensors: [tensors.pop(name) for name in list(tensors) if name[:4] == "mtp."])  # type: ignore[arg-type]
    edit_index(folder, lambda content: content.update(weight_map={k: v for k, v in listed.items() if k[:4] != "mtp."}))


@pytest.fixture
def dspark_folder(official_folder: Path) -> Path:
    """A folder in the shape of Flash-0731: three draft blocks in place of the MTP block."""
    listed = json.loads((official_folder / INDEX).read_text())["weight_map"]
    names = block_names([name for name in listed if name.startswith("mtp.0.")])
    drop_mtp(official_folder)
    blocks = [name.replace("mtp.0.", f"mtp.{number}.") for number in range(3) for name in names]
    add_shard(official_folder, [*blocks, *DSPARK_TENSORS])
    ratios = [*ModelConfig.from_pretrained(official_folder).compress_ratios[:4], 0, 0, 0]
    edit_config(official_folder, **DSPARK_KEYS, compress_ratios=ratios, num_nextn_predict_layers=3)
    return official_folder


def test_a_0731_folder_adds_only_the_published_drafter() -> None:
    """Flash-0731 lists 72,317 tensors."""
    listed = [spec.name for spec in tensor_inventory(ModelConfig.preset("flash"), "official")]
    main_model = [name for name in listed if not name.startswith("mtp.")]
    blocks = block_names([name for name in listed if name.startswith("mtp.0.")])
    drafter = [name.replace("mtp.0.", f"mtp.{number}.") for number in range(3) for name in blocks] + [*DSPARK_TENSORS]
    assert len(main_model) + len(drafter) == 72_317
    assert all(is_draft(name, 0) for name in drafter) and not any(is_draft(name, 0) for name in main_model)
    assert not any(is_draft(name, 1) for name in listed)


def test_the_main_model_of_a_dspark_folder_loads(
    dspark_folder: Path, official: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        model = load_model(dspark_folder)
    lines = [record.getMessage() for record in caplog.records if "total_size" not in record.getMessage()]
    blocks = len(block_names([name for name in official.stored if name.startswith("mtp.0.")]))
    assert lines == [
        f"{dspark_folder / 'config.json'}: a draft model of several blocks, which is left out; ignored keys: "
        + ", ".join(DSPARK_KEYS),
        f"{dspark_folder}: left unread, as the model is whole without it: a draft model in mtp.0 ({blocks + 3}), "
        f"mtp.1 ({blocks}), mtp.2 ({blocks + 7}), {3 * blocks + 10} tensors, {24 * (3 * blocks + 10) / 1e9:.3g} GB",
    ]
    assert model.config.num_nextn_predict_layers == 0 and model.config.compress_ratios == (0, 4, 128, 4)
    assert read_config(dspark_folder) == ModelConfig.from_pretrained(dspark_folder) == model.config
    for name, tensor in official_tensors(model.state_dict()).items():
        assert torch.equal(tensor.float(), official.values[name].float()), name


def test_convert_verify_and_inspect_take_a_dspark_folder(
    dspark_folder: Path, official: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(dspark_folder, tmp_path / "out", "official")
    listed = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert set(listed) == {name for name in official.stored if not name.startswith("mtp.")}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0 and not any("dspark" in key for key in written)
    load_model(tmp_path / "out")
    assert main(["convert", str(dspark_folder), str(tmp_path / "model"), "--format", "bf16"]) == 0
    edit_config(dspark_folder, index_topk=128)  # all entries: transformers breaks ties by another rule
    assert main(["verify", str(dspark_folder)]) == 0
    capfd.readouterr()
    assert main(["inspect", str(dspark_folder), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["checkpoint"]["tensors"] == len(listed)
    assert report["parameters"]["total_with_mtp"] == report["parameters"]["total"]


def test_blocks_after_the_mtp_block_and_foreign_sub_modules_are_left_unread(
    official_folder: Path, official: Any, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["mtp.0.markov_head.markov_w1.weight", "mtp.1.attn.wq_a.weight", "model.mtp.12.norm.weight", "dspark.norm"]
    add_shard(official_folder, names)
    model = load_model(official_folder)
    assert model.config.num_nextn_predict_layers == 1
    assert torch.equal(model.state_dict()["mtp.0.norm.weight"].float(), official.values["mtp.0.norm.weight"].float())
    (line,) = [record.getMessage() for record in caplog.records if "unread" in record.getMessage()]
    assert "dspark.norm (1), mtp.0 (1), mtp.1 (1), mtp.12 (1), 4 tensors" in line


@pytest.mark.parametrize(
    "name",
    ["layers.0.attn.wq_c.weight", "layers.4.attn.wq_a.weight", "mtp.0.attn.wq_c.weight", "mtp.0.ffn.gate.bias_vl"],
)
def test_other_unknown_tensors_are_still_refused(name: str, official_folder: Path) -> None:
    add_shard(official_folder, [name])
    with pytest.raises(CheckpointError, match="expected no tensor of that name in this model"):
        load_model(official_folder)


def test_an_mtp_block_that_the_config_does_not_name_is_left_unread(
    official_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The list of ratios keeps the MTP block's entry."""
    edit_config(official_folder, num_nextn_predict_layers=0)
    assert load_model(official_folder).config.compress_ratios == (0, 4, 128, 4)
    assert any("left unread" in record.getMessage() for record in caplog.records)


def test_the_error_for_a_missing_mtp_block_says_how_to_proceed(official_folder: Path) -> None:
    drop_mtp(official_folder)
    with pytest.raises(CheckpointError) as raised:
        load_model(official_folder)
    advice = '"num_nextn_predict_layers": 0'
    assert raised.value.tensor is not None and raised.value.tensor.startswith("mtp.0.") and advice in raised.value.found
    edit_config(official_folder, num_nextn_predict_layers=0)
    load_model(official_folder)


def test_verify_leaves_out_tokens_that_repeat_an_expert(
    official_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers counts the repeated expert twice."""
    table = "layers.0.ffn.gate.tid2eid"
    rewrite(shard_of(official_folder, table), lambda tensors: tensors[table][:9, 1].copy_(tensors[table][:9, 0]))  # type: ignore[arg-type]
    edit_config(official_folder, index_topk=128)  # all entries: transformers breaks ties by another rule
    assert main(["verify", str(official_folder)]) == 0
    assert "9 of 67 tokens repeat an expert, which transformers counts twice" in capsys.readouterr().out
