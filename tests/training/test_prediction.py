"""Predictions beside what training does: activations that the kernels save, stages of recipes, runs."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.analysis.activations import Recompute, head_activations, layer_activations
from dsv4.analysis.degrees import Degrees
from dsv4.analysis.hardware import MACHINES, cpu
from dsv4.analysis.training_flops import Phase
from dsv4.analysis.training_memory import Setting, StageShape, rank_memory
from dsv4.analysis.training_weights import weights_by_part
from dsv4.cli import main
from dsv4.commands.plan import CPU
from dsv4.commands.terminal.plan import print_plan
from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.recomputed import Recomputed
from dsv4.training.gradient import Work, compute_gradient, pack_batch
from dsv4.training.losses import LossWeights, compute_losses
from dsv4.training.prediction import Choice, RunPlan, check_run, plan_here, plan_run, recipe_to_plan
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


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors made in this context that are alive, and the most so far."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = id(storage), storage.nbytes()
        known = self._seen.get(place)
        if storage.data_ptr() in self._ignored or (known is not None and known() is storage):
            return

        def forget(_: object) -> None:
            self.now -= size
            del self._seen[place]

        self._seen[place] = weakref.ref(storage, forget)
        self.now += size
        self.most = max(self.most, self.now)


@pytest.mark.parametrize(
    "policy, phase, tolerance",
    [
        *(("none", "sparse", 0.12), ("sublayers", "sparse", 0.12), ("blocks", "sparse", 0.12)),
        *(("none", "dense", 0.12), ("blocks", "dense", 0.12), ("none", "warmup", 0.12)),
    ],
)
def test_most_bytes_of_a_steps_live_tensors_are_predicted(policy: Recompute, phase: Phase, tolerance: float) -> None:
    """Kept ones, the largest layer's backward, the head's gradient; few parameters have a gradient at that time."""
    if backends.native_module() is None:
        pytest.skip("the formulas are those of the native kernels")
    model, _ = make_model(**WIDER)
    tokens = 1024
    batch = pack_batch(Rows(draw_documents(1, tokens)), torch.device("cpu"))
    work = Work(0, 0, LossWeights(), quantized=False, attention=phase, recompute=policy)
    with LiveTensors(model.parameters()) as live:
        compute_gradient(model, [batch], work)
    shape = StageShape("one", phase, tokens, tokens, tokens, 1, tokens)
    setting = Setting(model.config, cpu(1e9, 1e9), 1, "fp32", quantized=False, mtp=True, efficiency=1.0)
    memory = rank_memory(setting, shape, Degrees(), policy, 0, 1)
    assert live.most == pytest.approx(memory.activations + memory.working, rel=tolerance)


def test_presets_are_the_published_runs() -> None:
    recipe = recipe_to_plan("flash", ["ladder.tokens=1_000_000_000_000"])
    assert [stage.sequence for stage in recipe.stages] == [4096, 16384, 65536, 65536, 1 << 20]
    assert {stage.batch_tokens for stage in recipe.stages} == {75497472}
    plan = plan_run(recipe, MACHINES["H200"], Choice(gpus=512, price=3.0))
    found = plan.to_dict()
    assert [stage["fits"] for stage in found["stages"]] == [True, True, True, True, False]
    larger = found["stages"][-1]["fits_on"]
    assert larger["gpus"] == 2048 and larger["context"] > 1 and found["stages"][0]["fits_on"] is None
    assert not found["fits"] and found["tokens"] == pytest.approx(1e12, rel=1e-3)
    assert found["cost"] is None is found["gpu_hours"] is found["stages"][-1]["mfu"], "what does not fit takes no time"
    assert plan.cost == pytest.approx(3 * plan.gpu_hours)
    assert all(stage["seconds"] > 0 and 0 < stage["mfu"] < 1 for stage in found["stages"][:-1])
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
    shown = capsys.readouterr().out
    assert "sparse-1048576: batch_tokens=67108864 in place of 72 rows, so that 64 ranks have 1 each" in shown
    stage = ["stages.0.steps=3", "run.recompute=blocks"]
    assert main(["plan", "nano", stage[0], "--device", CPU, "--json", stage[1]]) == 0  # around flags
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["machine"]["name"], found["steps"], found["precision"]) == ("cpu", 3, "fp32")
    assert found["stages"][0]["recompute"] == "blocks" and found["cost"] == 0
    assert main(["plan", "nano", *stage, "stages.0.recompute=experts", "--device", CPU, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["recompute"] == "experts"
    for words in (
        ["nano", "--device", CPU, "--recompute", "blocks", "--price", "1"],
        ["--check", "run", "--gpus", "2"],
    ):
        assert main(["plan", *words]) == 2
        named = "--recompute, --price" if "nano" in words else "--gpus"
        assert f"takes the recipe's own keys; without {named} (keys" in capsys.readouterr().err
    assert main(["plan"]) == 2
    with pytest.raises(SystemExit):
        main(["plan", "nano", "--device", CPU, "word"])
    assert "unexpected argument 'word'" in capsys.readouterr().err
    assert main(["plan", "nano", "stages.0.step=3"]) == 2
    assert "the nearest key is stages.0.steps" in capsys.readouterr().err


def printed(plan: RunPlan, width: int) -> list[str]:
    """Lines of a plan on a console of `width` columns."""
    out = io.StringIO()
    print_plan("recipe.toml", plan, Console(file=out, width=width))
    return out.getvalue().splitlines()


def test_a_plan_is_whole_in_narrow_terminals_and_what_does_not_fit_comes_first() -> None:
    """Figures were cut: "2.03e+..", "3,433.8 da..."; and a cost stood before stages that do not fit."""
    recipe = read_recipe(PretrainRecipe, None, ["stages.0.steps=3"]).resolve()
    plan = plan_run(recipe, MACHINES["H100"], Choice(gpus=1))
    (stage,) = plan.stages
    shape = replace(stage.shape, steps=146_144, tokens=146_144 * stage.shape.batch_tokens)
    long = replace(stage, computation=2030.0, communication=0.0)
    stages = tuple(replace(long, shape=replace(shape, name=f"stage-{i}")) for i in range(5))
    for width in (40, 80):
        lines = printed(replace(plan, stages=stages), width)
        assert lines[1] == "Stages" and "Memory of the fullest rank" in lines and not any("…" in line for line in lines)
        (row,) = [line for line in lines if line.startswith("stage-4 ")]
        assert row.split()[1:] == ["146,144", "1/1/1/1", "none", "2,030", f"{stage.mfu:.1%}", "3,433.7", "days"]
        assert "3.0B tokens: 17,168.5 days, 412,044.9 GPU hours, $824,090 at $2 each" in lines
    unfit = replace(stages[1], fits=False)
    lines = printed(replace(plan, stages=(stages[0], unfit)), 80)
    assert lines[1].startswith("stage-1 does not fit: ") and lines[2] == "Stages"
    (row,) = [line for line in lines if line.startswith("stage-1 ") and "none" in line]
    assert row.split()[-3:] == ["-", "-", "-"]
    assert "1.2B tokens: no time and no cost, since 1 of 2 stages does not fit" in lines and "$" not in "".join(lines)


def test_what_is_planned_of_a_recipe_s_name_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    for words in (["nano"], ["recipes/nano.toml"]):
        assert main(["plan", *words]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("recipes/nano.toml on 1 x H100") and "base dense-512" in shown and "long " in shown
    assert main(["plan", "nano", "base.stages.0.step=3"]) == 2
    assert "the nearest key is base.stages.0.steps" in capsys.readouterr().err
    assert main(["plan", "nano", "stages.0.steps=3"]) == 0
    assert "This is one pre-training run of nano's shape" in capsys.readouterr().out
    for name in ("v4", "pretrain"):
        assert main(["plan", name]) == 2
        told = capsys.readouterr().err
        assert f"{name} is a recipe of dsv4 train, which is not planned by its name; allowed: a file of keys" in told
    assert main(["plan", "recipes/v4.toml"]) == 2
    told = capsys.readouterr().err
    assert "start, level, budget and 6 more are unknown" in told and "nearest" not in told


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


def test_stages_of_a_recipe_s_pipeline_are_planned() -> None:
    words = ["stages.0.steps=1", "stages.0.batch_tokens=8192", "parallel.pipeline=2"]
    even, uneven = (
        plan_run(read_recipe(PretrainRecipe, None, [*words, *more]).resolve(), MACHINES["H100"], Choice())
        for more in ([], ["parallel.stages=[1, 5]"])
    )
    assert uneven.stages[0].memory.masters > even.stages[0].memory.masters  # of the fullest rank
    assert uneven.stages[0].memory.total != even.stages[0].memory.total


PARTS = """
seconds = 3600.0
[base.model]
base = "nano"
[base.run]
precision = "bf16"
[[base.stages]]
name = "short"
steps = 10
[[base.stages]]
name = "long"
sequence = 8192
steps = 4
[mid]
stages = [{steps = 2}]
[sft]
stages = [{tokens = 40960}]
[long]
stages = [{steps = 1}]
"""


def test_a_recipe_of_several_parts_is_one_plan_with_a_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nano.toml"
    path.write_text(PARTS)
    assert main(["plan", str(path), "--json", "base.run.precision=fp32"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["parts"]
    assert list(parts) == ["base", "mid", "sft", "long"] and parts["base"]["precision"] == "fp32"
    assert [stage["name"] for stage in parts["base"]["stages"]] == ["short", "long"]
    assert found["tokens"] == 10 * 4096 + 4 * 8192 + 2 * 4096 + 40960 + 4096
    assert found["seconds"] == pytest.approx(sum(part["seconds"] for part in parts.values()))
    assert (found["budget_seconds"], found["fits"]) == (3600.0, True)
    assert main(["plan", str(path), "--device", CPU]) == 0
    shown = capsys.readouterr().out
    assert "base long" in shown and "sft pretrain" in shown and "the recipe's budget of 1.0 hours" in shown
    assert main(["plan", str(path), "base.model.base=pro"]) == 0
    large = capsys.readouterr().out.splitlines()
    assert "base short does not fit: " in large[1] and "no cost" in large[-1] and "budget" not in large[-1]
    assert main(["plan", str(path), "base.stages=[]"]) == 2
    assert "base has no stages; allowed: one or more, for each of base, mid, sft, long" in capsys.readouterr().err
    assert main(["plan", str(path), "mid.stages.0.step=3"]) == 2
    assert "the nearest key is mid.stages.0.steps" in capsys.readouterr().err
