"""Runs that go on from a model folder: continued training of every parameter, and LoRA adapters."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dsv4
from dsv4.analysis.training_flops import training_flops
from dsv4.checkpoint import convert, load_model, save_model
from dsv4.checkpoint.adapter_files import Adapter
from dsv4.cli import main as cli
from dsv4.config import nano_path
from dsv4.model.batch import RaggedBatch
from dsv4.model.stacks import native_tensors
from dsv4.model.transformer import Transformer
from dsv4.training.handover import take_state
from dsv4.training.lora import planned
from dsv4.training.lora_settings import LoraSettings
from dsv4.training.prediction import check_run
from dsv4.training.pretrain_folder import new_run
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.pretrain_run import make_source, make_trainer
from dsv4.training.recipe import read_recipe
from dsv4.training.start import folder_values, load_start

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pretrain.py"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CONFIG = replace(
    dsv4.ModelConfig.preset("nano"), hidden_size=32, num_hidden_layers=3, num_hash_layers=1, num_attention_heads=2,
    head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8, n_routed_experts=4,
    moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
)  # fmt: skip
SIZE = [
    *("stages.0.row_tokens=128", "stages.0.sequence=64", "data.group_rows=4", "run.seed=3"),
    *("optimizer.warmup_steps=0", "run.save_every=1"),
]


@pytest.fixture(scope="module")
def main() -> Any:
    return runpy.run_path(str(RECIPE))["main"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny model in the layouts that a run can start from, and the text to train on."""
    root = tmp_path_factory.mktemp("start")
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(4))
    save_model(model, CONFIG, root / "official")
    for name in TOKENIZER:
        if (nano_path() / name).is_file():
            (root / "official" / name).write_bytes((nano_path() / name).read_bytes())
    convert(root / "official", root / "official-base", "official-base", allow_rounding=True)
    # As transformers writes it: without the MTP block.
    config = replace(CONFIG, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    save_model(tensors, config, root / "without_mtp", "transformers")
    for name in TOKENIZER:
        if (root / "official" / name).is_file():
            (root / "without_mtp" / name).write_bytes((root / "official" / name).read_bytes())
    (root / "texts").mkdir()
    for n in range(6):
        (root / "texts" / f"{n}.txt").write_text("Some words, and others; the end.\n" * (9 + n))
    return {path.name: path for path in root.iterdir()}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", ["official", "official-base", "without_mtp"])
def test_a_run_goes_on_from_the_weights_of_any_layout(
    layout: str, main: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The first loss is the start's own."""
    run = tmp_path / "run"
    words = [f"model.start={folders[layout]}", f"data.text={folders['texts']}", "stages.0.steps=2", *SIZE]
    assert main([*words, "loss.balance=0", "--run-dir", str(run)]) == 0
    first = rows(run)[0]
    assert first["lr"] == pytest.approx(3e-4)  # the default of runs that do not begin from scratch
    assert (first["mtp_loss"] > 0) == (layout != "without_mtp")
    recipe = read_recipe(PretrainRecipe, run / "recipe.toml")
    source = make_source(recipe, 0, run, CONFIG, 0)
    batch = source.batch(0)
    start, losses, targets = load_model(folders[layout]), 0.0, 0
    for document, mask in zip(batch.documents, batch.loss_masks, strict=True):
        with torch.no_grad():
            log = start.next_token_logits(RaggedBatch.pack([document])).log_softmax(-1)
        wanted = [(t, token) for t, token in enumerate(document[1:]) if mask[t + 1]]
        losses, targets = losses - sum(float(log[t, token]) for t, token in wanted), targets + len(wanted)
    assert first["loss"] == pytest.approx(losses / targets, rel=1e-5)
    trained = dsv4.load(run / "model")
    assert trained.config.num_nextn_predict_layers == (0 if layout == "without_mtp" else 1)


@pytest.mark.parametrize("layout", ["official", "official-base", "without_mtp"])
def test_ranks_read_the_weights_that_they_keep(layout: str, folders: dict[str, Path]) -> None:
    """With the bits of a model loaded whole."""
    folder = folders[layout]
    want = native_tensors(load_start(folder, dsv4.ModelConfig.from_pretrained(folder), torch.device("cpu")))
    kept = {name for name in want if not name.startswith("layers.1.")}
    found = {name: value.float() for name, value in folder_values(folder)(kept)}
    assert found.keys() == kept and all(torch.equal(found[name], want[name].float()) for name in kept)


@pytest.mark.parametrize("saved", ["state.pt", "checkpoints"])
def test_a_run_that_started_from_a_model_goes_on_without_it(
    saved: str, main: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every parameter is in its state, of ranks too. A key may differ from the start's if it keeps tensors' shapes."""
    words = [f"data.text={folders['texts']}", "stages.0.steps=2", "model.index_topk=4", *SIZE]
    start = tmp_path / "start"
    convert(folders["official"], start, "official")
    assert main([f"model.start={start}", *words, "--run-dir", str(tmp_path / "straight")]) == 0
    assert main([f"model.start={start}", *words, "stages.0.steps=1", "--run-dir", str(tmp_path / "cut")]) == 0
    if saved == "checkpoints":
        take_state(tmp_path / "cut", Transformer(dsv4.ModelConfig.from_pretrained(tmp_path / "cut")), {})
    assert (tmp_path / "cut" / saved).exists()
    recipe = tmp_path / "cut" / "recipe.toml"
    recipe.write_text((tmp_path / "straight" / "recipe.toml").read_text())
    for path in start.glob("*.safetensors"):
        path.write_bytes(b"")
    assert main(["--resume", "--run-dir", str(tmp_path / "cut")]) == 0
    assert [row["loss"] for row in rows(tmp_path / "cut")] == [row["loss"] for row in rows(tmp_path / "straight")]
    assert dsv4.load(tmp_path / "cut" / "model").config.index_topk == 4


def test_adapters_resume_to_the_same_bits(
    main: Any, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And their line has MFU and memory, of the operations that adapters need; their plan is compared with the run."""
    start = folders["official"]
    words = [f"model.start={start}", f"data.text={folders['texts']}", "lora.rank=2", "stages.0.steps=3", *SIZE]
    assert main([*words, "--run-dir", str(tmp_path / "straight")]) == 0
    assert re.search(r" tok/s  MFU \d+\.\d%  \d\.\d GB  left 0:00", capsys.readouterr().out)
    (compared,) = check_run(tmp_path / "straight", 8e9)
    adapters = planned(LoraSettings(2), "adamw", CONFIG)
    flops, every = (training_flops(CONFIG, (64,), adapters=one) / 64 for one in (adapters, None))
    assert flops < 0.8 * every
    for row in rows(tmp_path / "straight"):
        assert row["flops_per_second"] / row["tokens_per_second"] == pytest.approx(flops, rel=0.05)
    assert compared.steps == 3 and compared.predicted_seconds > 0 and compared.predicted_bytes > 350e6
    kept = sorted(path.name for path in (tmp_path / "straight" / "adapter").iterdir())
    assert kept == ["adapter_config.json", "adapter_model.safetensors"]
    again = tmp_path / "again"
    console = Console(quiet=True)
    recipe = new_run(read_recipe(PretrainRecipe, None, words), again, console)
    make_trainer(recipe, again, 0, console).run(stop_after=1)
    state = torch.load(again / "state.pt")
    assert all(".lora_" in name for name in state["model"])
    assert main(["--resume", "--run-dir", str(again)]) == 0
    assert [(row["loss"], row["grad_norm"]) for row in rows(again)] == [
        (row["loss"], row["grad_norm"]) for row in rows(tmp_path / "straight")
    ]
    for name in ("adapter/adapter_model.safetensors", "model/model-00001-of-00001.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert dsv4.load(again / "model").config == dsv4.load(start).config
    assert "layers.1.ffn.experts.0.w1.weight" in Adapter(again / "adapter", CONFIG).names
    file = next(start.glob("*.safetensors"))
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(SystemExit, match="official holds other weights than the run began with"):
            main(["--resume", "--run-dir", str(again)])
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.base=nano"], "start and base; allowed: one of them"),
        (["model.layers=2"], "start and layers; allowed: one of them"),
        (["model.hidden_size=64"], r"embed.weight would be and is, in .*official, \[8192, 64\] and \[8192, 32\]"),
        (["model.num_nextn_predict_layers=0", "model.compress_ratios=[0,4,128]"], "absent"),
        (["data.tokenizer=other"], "other is another tokenizer than that of .*official"),
        (["lora.rank=2", "run.replicas=2"], "lora.rank and run.replicas 2; allowed: 1"),
        (["lora.rank=2", "run.quantized_share=0.5"], "lora.rank and run.quantized_share 0.5; allowed: 0"),
        (["lora.rank=2", "model.index_topk=4"], "lora.rank and a changed key of the model"),
        (["lora.alpha=2"], "keys of lora without lora.rank"),
        (["lora.rank=2", "lora.targets=wo_a"], "'wo_a', which is no matrix of this model"),
        (["lora.rank=2", "stages.0.attention=warmup"], "stage 'pretrain' with attention 'warmup'"),
    ],
)
def test_settings_that_do_not_go_together(
    words: list[str], message: str, main: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    text = (nano_path() / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "other" / "tokenizer.json").write_text(text + " ", encoding="utf-8")
    start, texts = f"model.start={folders['official']}", f"data.text={folders['texts']}"
    with pytest.raises(SystemExit, match=message):
        main([start, texts, "stages.0.steps=1", *SIZE, *words, "--run-dir", str(tmp_path / "run")])


def test_shards_of_another_vocabulary_and_a_start_without_a_tokenizer(
    main: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (nano_path() / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text + " ", encoding="utf-8")
    words = ["data", "tokenize", str(folders["texts"]), "--model", str(other), "--out", str(tmp_path / "shards")]
    assert cli(words) == 0
    start = f"model.start={folders['official']}"
    with pytest.raises(SystemExit, match="tokenizer"):
        main([start, f"data.shards={tmp_path / 'shards'}", "stages.0.steps=1", *SIZE, "--run-dir", str(tmp_path / "a")])
    convert(folders["official"], tmp_path / "bare", "official")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    bare = [f"model.start={tmp_path / 'bare'}", f"data.text={folders['texts']}", "stages.0.steps=1", *SIZE]
    with pytest.raises(SystemExit, match=r"bare has no tokenizer.json; give data.tokenizer"):
        main([*bare, "--run-dir", str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="'./nowhere' is no folder here"):
        main(["model.start=./nowhere", f"data.text={folders['texts']}", "--run-dir", str(tmp_path / "c")])
