"""Recipes: files, overrides, errors that name the nearest key, and the report's ladder of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4.config import ModelConfig
from dsv4.presets import PRESETS
from dsv4.training.ladder import rungs, sequence_lengths
from dsv4.training.loop import TrainSettings
from dsv4.training.nano_recipe import PARTS, NanoRecipe
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.recipe import RecipeError, known_keys, read_recipe, split_words, write_recipe
from dsv4.training.schedule import Schedule


def read(*overrides: str, path: Path | None = None) -> PretrainRecipe:
    return read_recipe(PretrainRecipe, path, overrides)


def test_long_values_are_keys_and_what_exists_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "rate=1e-3.toml"
    path.touch()
    long = f"problems.tasks=[{'x' * 300}]"  # longer than a file's name may be
    assert split_words([str(path), long, "none=1"]) == ([str(path)], [long, "none=1"])


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('optimizer = {rate = 2e-3, momentum = 0.9}\n[[stages]]\nname = "a"\nsteps = 3\n')
    recipe = read("optimizer.rate=1e-3", "stages.1.steps=4", "stages.1.name=b", "data.text=docs/*.md", path=file)
    assert (recipe.optimizer.rate, recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (1e-3, 0.9, 0.1)
    assert [(stage.name, stage.steps) for stage in recipe.stages] == [("a", 3), ("b", 4)]
    assert recipe.data.text == ("docs/*.md",)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.lr=1", "optimizer.lr is unknown; the nearest key is optimizer.rate"),
        ("optimiser.rate=1", "optimiser is unknown; the nearest key is optimizer$"),
        ("stagse.0.steps=1", "stagse is unknown; the nearest key is stages$"),
        ("model.hidden_sise=3", "the nearest key is model.hidden_size"),
        ("stages.0.step=3", "stages.0.step is unknown; the nearest key is stages.0.steps"),
        ("optimizer.rate=fast", "optimizer.rate is 'fast': Input should be a valid number"),
        ("model.hidden_size=wide", "hidden_size is 'wide'; it must be"),
        ("run.replicas=0", "run.replicas is 0: Input should be greater than or equal to 1"),
        ("stages.2.steps=3", "'2'; allowed: a number up to 0"),
        ("run.seed.x.y=3", "run.seed: Input should be a valid integer"),
        ("stages.0.name=x", "stage 'x' has steps None, tokens None; allowed: one of them"),
        ("quick", "override 'quick'; allowed: KEY=VALUE"),
    ],
)
def test_a_wrong_override_is_refused_with_its_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(override)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["stages.0.steps=1", "ladder.tokens=5"], "has stages and ladder.tokens"),
        (["stages.0.steps=1", "stages.0.batch_tokens=4097"], "batch_tokens is 4097; allowed: multiples of 4096"),
        (["stages.0.steps=1", "stages.0.row_tokens=64"], "row_tokens 64; allowed: sequence, 1024, or more"),
        (["stages.0.steps=1", "stages.0.ramp_from=4096", "stages.0.ramp_tokens=9"], "a ramp has a smaller first size"),
        (["stages.0.steps=1", "stages.0.attention=warmup", "model.layers=2"], "no layer of the model has an indexer"),
        (["ladder.tokens=9", "ladder.dense=0.95"], "less than 1 together"),
        (["model.hidden_size=-1"], "hidden_size"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*overrides).resolve()


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("x = = 3")
    with pytest.raises(RecipeError, match="bad.toml: not valid TOML"):
        read(path=tmp_path / "bad.toml")


def test_a_recipe_of_another_kind_is_one_sentence() -> None:
    path = Path(__file__).resolve().parents[2] / "recipes" / "v4.toml"
    with pytest.raises(RecipeError) as error:
        read(path=path)
    assert str(error.value) == (
        f"{path}: start, level, budget and 6 more are unknown, as in a recipe of another kind; allowed: model, data, "
        "optimizer, loss, run, lora, parallel, stability, ladder, stages"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none.toml: no such file; allowed: a recipe in TOML"):
        read(path=tmp_path / "none.toml")


@pytest.mark.parametrize("base", PRESETS)
def test_a_resolved_recipe_reads_back_to_itself(base: str, tmp_path: Path) -> None:
    recipe = read(f"model.base={base}", "ladder.tokens=10_000_000", "run.replicas=2").resolve()
    assert recipe.model.config() == ModelConfig.preset(base)
    (tmp_path / "resolved.toml").write_text(write_recipe(recipe))
    again = read(path=tmp_path / "resolved.toml")
    assert again.resolve() == again and write_recipe(again) == write_recipe(recipe)


def test_layers_go_on_as_the_last_two_and_keep_the_mtp_block() -> None:
    for layers, ratios in ((8, (0, 0, 4, 128, 4, 128, 4, 128, 0)), (3, (0, 0, 4, 0)), (1, (0, 0))):
        config = read(f"model.layers={layers}").resolve().model.config()
        assert config.num_hidden_layers == layers and config.compress_ratios == ratios


def test_the_ladder_is_the_reports_at_a_million_tokens_and_shrinks_with_the_context() -> None:
    assert sequence_lengths(1 << 20) == (4096, 16384, 65536, 1 << 20)
    assert sequence_lengths(1 << 16) == (256, 1024, 4096, 1 << 16)
    assert sequence_lengths(8192) == (256, 512, 8192) and sequence_lengths(128) == (128,)


@pytest.mark.parametrize("context, dense", [(1 << 20, 2), (8192, 1), (200, 1)])
def test_attention_is_dense_then_warms_the_indexer_up_then_sparse(context: int, dense: int) -> None:
    found = rungs(context, 1_000_000, dense=0.1, warmup=0.01, longest=0.2)
    phases = [rung.attention for rung in found]
    assert phases == ["dense"] * dense + ["warmup"] + ["sparse"] * (len(found) - dense - 1)
    assert sum(rung.tokens for rung in found) == pytest.approx(1_000_000, abs=len(found))
    assert [rung.sequence for rung in found] == sorted(rung.sequence for rung in found)
    assert found[-1].sequence == context


def test_a_batch_grows_in_the_first_stage_to_the_reports_size() -> None:
    """Flash: 75.5M tokens, 18,432 documents of 4K, 72 of 1M."""
    flash = "model.base=flash", "ladder.tokens=32_000_000_000_000", f"ladder.batch_tokens={72 << 20}"
    stages = read(*flash, "run.replicas=8").resolve().stages
    assert [stage.sequence for stage in stages] == [4096, 16384, 65536, 65536, 1 << 20]
    assert {stage.batch_tokens for stage in stages} == {72 << 20}
    assert [bool(stage.ramp_from) for stage in stages] == [True, False, False, False, False]
    size: Any = stages[0].size(8)
    assert size.last * size.tokens == 72 << 20 and size.at(0) < size.at(size.steps(10**11)) < size.last
    assert sum(stage.tokens or 0 for stage in stages if stage.attention == "dense") == 10**12


@pytest.mark.parametrize(
    "dense", [(), ("ladder.dense=0",), ("ladder.dense=0", "ladder.warmup=0"), ("ladder.dense=0.5",)]
)
def test_a_batch_has_grown_when_the_ladders_first_stage_ends(dense: tuple[str, ...]) -> None:
    stages = read("ladder.tokens=1_000_000_000", "ladder.context=65536", "ladder.batch_tokens=262144", *dense).resolve()
    first = stages.stages[0]
    size = first.size(1)
    assert first.ramp_tokens == min(first.tokens or 0, 30_000_000)
    assert size.at(0) < size.last and size.at(first.num_steps(1) - 1) >= size.last - 2


def test_the_recipe_file_of_the_repository_goes_through_all_phases() -> None:
    recipe = read(path=Path(__file__).resolve().parents[2] / "recipes" / "stages.toml").resolve()
    assert [stage.attention for stage in recipe.stages] == ["dense", "warmup", "sparse"]
    assert [stage.num_steps(1) for stage in recipe.stages] == [80, 20, 184]


def test_recipes_whose_models_are_served_quantize() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    assert read(path=folder / "stages.toml").run.quantized_share == 0.15
    nano = read_recipe(NanoRecipe, folder / "nano.toml")
    assert [getattr(nano, part).run.quantized_share for part in PARTS] == [0.15, 0.3, 1.0, 1.0]


PUBLISHED = {"flash": (2.7e-4, 2000, 1e-3), "pro": (2.0e-4, 2000, 1e-3)}


@pytest.mark.parametrize("base", ["flash", "pro", "flash-base", "pro-base"])
def test_a_published_shape_trains_by_default_as_it_was(base: str, tmp_path: Path) -> None:
    recipe = read(f"model.base={base}", "model.layers=4").resolve()
    found = recipe.optimizer
    rate, warmup_steps, balance_speed = PUBLISHED[base.removesuffix("-base")]
    assert (found.rate, found.warmup_steps, found.balance_speed, found.final_ratio) == (
        *(rate, warmup_steps, balance_speed), 0.1,
    )  # fmt: skip
    written = tmp_path / "recipe.toml"
    written.write_text(write_recipe(recipe))
    assert f"rate = {rate}\nwarmup_steps = 2000\n" in written.read_text()
    assert read(path=written) == recipe == recipe.resolve()
    given = read(f"model.base={base}", "model.layers=4", "optimizer.rate=1e-3", "optimizer.warmup_steps=3").resolve()
    assert (given.optimizer.rate, given.optimizer.warmup_steps, given.optimizer.balance_speed) == (1e-3, 3, 1e-3)


def test_a_shape_of_ones_own_has_nanos_defaults_and_the_reports() -> None:
    recipe = read("data.text=x").resolve()
    assert (recipe.optimizer.rate, recipe.optimizer.warmup_steps, recipe.optimizer.balance_speed) == (3e-3, 40, 3e-3)
    assert (recipe.loss.mtp, recipe.loss.mtp_in_decay, recipe.loss.balance) == (0.3, 0.1, 1e-4)
    assert recipe.run.quantized_share == TrainSettings(Schedule(1e-3, 1)).quantized_share == 0.0


def test_known_keys_are_dotted() -> None:
    keys = set(known_keys(PretrainRecipe))
    assert {"optimizer.rate", "model.layers", "model.hidden_size", "stages.0.attention", "ladder.tokens"} <= keys
