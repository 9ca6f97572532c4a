"""Predictions beside what training does: activations that the kernels save, stages of recipes, runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.analysis.activations import head_activations, layer_activations
from dsv4.analysis.hardware import MACHINES
from dsv4.analysis.training_weights import weights_by_part
from dsv4.cli import main
from dsv4.commands.plan import CPU
from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.recomputed import Recomputed
from dsv4.training.gradient import pack_batch
from dsv4.training.losses import LossWeights, compute_losses
from dsv4.training.prediction import Choice, check_run, plan_here, plan_run, recipe_to_plan
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.recipe import read_recipe, write_recipe

from .tiny_training import CONFIG, Rows, draw_documents, make_model

WIDER = {"hidden_size": 96, "q_lora_rank": 48, "moe_intermediate_size": 40, "n_routed_experts": 8}


def test_activations_are_those_that_the_native_kernels_save(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.native_module() is None:
        pytest.skip("the formulas are those of the native kernels")
    model, _ = make_model(**WIDER)
    tokens = 384
    batch = pack_batch(Rows(draw_documents(1, tokens)), torch.device("cpu"))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            saved[place] = tensor
        return tensor

    def pack_inside(recomputed: Recomputed, tensor: Tensor) -> Tensor | torch.Size:
        kept = pack_kept(recomputed, tensor)
        return pack(kept) if isinstance(kept, Tensor) else kept

    pack_kept = Recomputed._pack  # whose hooks are the innermost ones
    monkeypatch.setattr(Recomputed, "_pack", pack_inside)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_losses(model, batch.batch, batch.mask, LossWeights(), AuxLosses())
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    config = model.config
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    per_token, besides = head_activations(config, 4)
    predicted = tokens * sum(layer_activations(config, layer).kept("none", 4) for layer in layers)
    predicted += 2 * (tokens * per_token + besides)  # of the main model and of the MTP block
    assert found == pytest.approx(predicted, rel=0.1)


def test_presets_are_the_published_runs() -> None:
    recipe = recipe_to_plan("flash", ["ladder.tokens=1_000_000_000_000"])
    assert [stage.sequence for stage in recipe.stages] == [4096, 16384, 65536, 65536, 1 << 20]
    assert {stage.batch_tokens for stage in recipe.stages} == {75497472}
    plan = plan_run(recipe, MACHINES["H200"], Choice(gpus=1024, price=3.0))
    found = plan.to_dict()
    assert [stage["fits"] for stage in found["stages"]] == [True, True, True, True, False]
    assert not found["fits"] and found["tokens"] == pytest.approx(1e12, rel=1e-3)
    assert found["cost"] == pytest.approx(3 * found["gpu_hours"])
    with pytest.raises(ValueError, match="'big' is no file; allowed: a recipe in TOML, or one of flash, pro"):
        recipe_to_plan("big", [])
    with pytest.raises(ValueError, match="; did you mean flash\\?"):
        recipe_to_plan("fash", [])


def write_run(folder: Path, seconds: float) -> None:
    """A run of four steps of 256 tokens, as recipes/pretrain.py writes it."""
    folder.mkdir()
    recipe = read_recipe(PretrainRecipe, None, ["stages.0.steps=4", "stages.0.row_tokens=256", "stages.0.sequence=256"])
    (folder / "recipe.toml").write_text(write_recipe(recipe.resolve()))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    rows = [
        {
            "step": step, "stage": "pretrain", "tokens": 256 * (step + 1), "tokens_per_second": 256 / seconds,
            "flops_per_second": 5e9, "mfu": 0.5, "peak_memory_bytes": 400_000_000,
        }
        for step in range(4)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_compared_with_its_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", seconds=2.0)
    (one,) = check_run(tmp_path / "run", 8e9)
    assert (one.steps, one.tokens_per_step, one.measured_seconds, one.measured_bytes) == (4, 256, 2.0, 400e6)
    assert 350e6 < one.predicted_bytes < 400e6 and 0 < one.predicted_seconds < 2.0
    assert main(["plan", "--check", str(tmp_path / "run")]) == 0
    assert "Predicted and measured" in capsys.readouterr().out
    assert main(["plan", "--check", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run of recipes/pretrain.py" in capsys.readouterr().err


def test_the_command_plans_for_gpus_and_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flash", "--gpus", "1024", "--expert", "64"]) == 0
    assert "sparse-1048576" in capsys.readouterr().out
    stage = ["stages.0.steps=3", "run.recompute=blocks"]
    assert main(["plan", "nano", stage[0], "--device", CPU, "--json", stage[1]]) == 0  # around flags
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["machine"]["name"], found["steps"], found["precision"]) == ("cpu", 3, "fp32")
    assert found["stages"][0]["recompute"] == "blocks" and found["cost"] == 0
    assert main(["plan", "nano", *stage, "stages.0.recompute=experts", "--device", CPU, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["recompute"] == "experts"
    assert main(["plan"]) == 2
    with pytest.raises(SystemExit):
        main(["plan", "nano", "--device", CPU, "word"])
    assert "unexpected argument 'word'" in capsys.readouterr().err
    assert main(["plan", "nano", "stages.0.step=3"]) == 2
    assert "the nearest key is stages.0.steps" in capsys.readouterr().err


def test_ranks_and_precision_of_a_recipe_are_planned(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nprecision = "fp8"\n[parallel]\ndata = 2\nexpert = 2\n[[stages]]\nsteps = 10\n')
    recipe = recipe_to_plan(str(path), [])
    plan = plan_run(recipe, MACHINES["H100"], Choice())
    (stage,) = plan.stages
    assert (plan.setting.gpus, plan.setting.precision) == (4, "fp8")
    assert (stage.degrees.data, stage.degrees.expert, stage.shape.batch_tokens) == (2, 2, 4 * 4096)
    fp32, bf16 = (
        plan_here(read_recipe(PretrainRecipe, None, words).resolve(), CONFIG, 1e9, 1e9).stages[0].memory
        for words in (["stages.0.steps=1"], ["stages.0.steps=1", "run.precision=bf16"])
    )
    rounded = sum(part.rounded for part in weights_by_part(CONFIG).values())
    assert (fp32.weights, bf16.weights, bf16.activations) == (0, 2 * rounded, fp32.activations)
    with pytest.raises(ValueError, match="several ranks"):
        plan_here(recipe, recipe.model.config(), 1e9, 1e9)
