"""A few steps of the nano recipe, from a corpus to a model folder that loads."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("reasoning_gym")

import dsv4
from dsv4.config import ModelConfig
from dsv4.data.shard_loader import RowShape
from dsv4.training.loop import Stage
from dsv4.training.nano_recipe import PARTS
from dsv4.training.sources import TASKS, MixtureSource, PartPaths
from recipes import nano

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from nano_corpus import write_corpus

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "nano.py"
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_hash_layers": 1, "num_attention_heads": 2, "q_lora_rank": 16,
    "o_lora_rank": 16, "index_n_heads": 2, "index_topk": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "compress_ratios": "[0, 4, 128, 0]",
}  # fmt: skip
STAGES = {"base": 5, "mid": 5, "sft": 2, "long": 1}
SHARDS = 'shards=["prose=0.3", "definitions=0.2", "recall-512=0.3"]'
ROWS = ["sequence=256", "row_tokens=512", "batch_tokens=512", SHARDS]


def keys() -> list[str]:
    """Overrides that keep the recipe's stages and make everything small."""
    found = [f"{part}.model.{key}={value}" for part in PARTS for key, value in SMALL.items()]
    stages = [f"{part}.stages.{n}" for part in PARTS for n in range(STAGES[part])]
    found += [f"{stage}.{row}" for stage in stages for row in ROWS]
    found += ["base.stages.0.ramp_from=0", "base.stages.0.ramp_tokens=0", "data.scale=0.001"]
    return [*found, *(f"{part}.{key}" for part in PARTS for key in ("data.group_rows=4", "run.replicas=1"))]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch):
    """The recipe's main; the tokenizer is trained without the tasks."""
    monkeypatch.setattr("dsv4.data.nano.tokenizer.task_texts", lambda: iter(["a word"]))
    return runpy.run_path(str(RECIPE))["main"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_every_stage_runs_and_the_sft_goes_on_from_the_base(recipe, corpus: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "models" / "nano"
    common = ["--run-dir", str(run), "--out", str(out)]
    assert (
        recipe(
            [
                "--corpus",
                str(corpus),
                "--steps",
                "12",
                *common,
                "mid_share=0.3",
                "sft_share=0.1",
                "long_share=0.1",
                "sft.stages.0.tokens=1000",
                "sft.stages.1.tokens=1000",
                *keys(),
            ]
        )
        == 0
    )
    metrics = [json.loads(line) for line in (run / "base" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == list(range(12))
    assert {entry["stage"] for entry in metrics} >= {"dense-512", "dense-2048", "sparse-4096", "sparse-32768"}
    tuned = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in tuned] == ["sft", "sft-32768"]
    stretched = [json.loads(line) for line in (run / "long" / "metrics.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in stretched} == {"long-32768"}
    configs = {part: ModelConfig.from_pretrained(run / part / "model") for part in ("base", "mid", "sft", "long")}
    assert {part: config.rope_scaling.original_max_position_embeddings for part, config in configs.items()} == {
        "base": 65536,
        "mid": 65536,
        "sft": 65536,
        "long": 4096,
    }
    assert ModelConfig.from_pretrained(out) == configs["long"]
    recalled = [json.loads(line) for line in (run / "mid" / "metrics.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in recalled} >= {"dense-512", "dense-2048", "sparse-4096", "sparse-32768"}
    learned = [sum(row["targets"] for row in rows) / rows[-1]["tokens"] for rows in (metrics, tuned)]
    assert learned[0] > 0.8 and learned[1] < learned[0] - 0.05  # the sft learns what the assistant says
    assert (run / "base" / "held_out.jsonl").read_text().count("bits_per_byte") == 1
    base, model = dsv4.load(run / "mid" / "model"), dsv4.load(out)
    logits = model(torch.tensor([[0, 5, 6]]))
    assert logits.shape == (1, 3, model.config.vocab_size) and bool(logits.isfinite().all())
    distance = (base.embed.weight - model.embed.weight).abs().mean() / base.embed.weight.abs().mean()
    assert 0 < distance < 0.2  # two small steps from the base, not a model from scratch
    assert dsv4.Tokenizer.from_pretrained(out).vocab_size == model.config.vocab_size == 8192

    with pytest.raises(SystemExit, match="already holds a run"):
        recipe(["--corpus", str(corpus), "--steps", "2", *common])
    before = (out / "config.json").stat().st_ctime_ns
    assert recipe(["--resume", *common]) == 0  # nothing left to train: the folder is written again
    assert (out / "config.json").stat().st_ctime_ns > before


@dataclass
class Counting:
    """A trainer of 450 steps that does nothing in them."""

    progress: SimpleNamespace
    model: None = None

    @property
    def finished(self) -> bool:
        return self.progress.step == 450

    def run(self, stop_after: int) -> None:
        self.progress.step = min(450, stop_after)


@pytest.mark.parametrize(
    ("step", "known", "measured"),
    [(0, [], [200, 400, 450]), (200, [200], [400, 450]), (200, [], [200, 400, 450]), (150, [], [200, 400, 450]),
     (450, [], [450]), (450, [450], [])],
)  # fmt: skip
def test_a_point_of_the_held_out_curve_that_a_kill_prevented_is_measured(
    step: int, known: list[int], measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    curve = SimpleNamespace(
        has=lambda step: step in known, measure=lambda model, step, tokens: found.append(step) or 1.0,
        draw=lambda picture: None,
    )  # fmt: skip
    monkeypatch.setattr(nano, "has_held_out", lambda corpus: True)
    monkeypatch.setattr(nano, "HeldOut", lambda *paths: curve)
    trainer = Counting(SimpleNamespace(step=step, tokens=0))
    nano.train(trainer, tmp_path, tmp_path, Console(quiet=True))  # type: ignore[arg-type]  # pyright: ignore
    assert found == measured


def test_haystacks_have_the_loss_of_the_recipes_tasks() -> None:
    names = ("prose", "needles-512", "recall-4096")
    parts = [PartPaths(TASKS, (), 1.0, "all"), *(PartPaths(name, (Path(name),)) for name in names)]
    source = MixtureSource(Path("tokenizer"), tuple(parts), 1, RowShape(512, 512))
    (stage,) = nano.choose_losses([Stage("a", 1.0, source)], "all")
    assert isinstance(stage.source, MixtureSource)
    assert [part.loss for part in stage.source.parts] == ["all", "mask", "all", "all"]


def test_the_whole_recipe_keeps_the_limits() -> None:
    """Its model's folder has at most 25 MB; every shard that a stage names is made; shares and contexts are right."""
    from dsv4.analysis.inventory import checkpoint_bytes
    from dsv4.data.nano.build import DEFINITIONS, HAYSTACKS, RECALLS, haystack_part, recall_part
    from dsv4.training.nano_recipe import NanoRecipe
    from dsv4.training.recipe import read_recipe

    whole = read_recipe(NanoRecipe, RECIPE.with_suffix(".toml"))
    groups = {"dictionaries", "prose", "manuals", "programming", "code", "mathematics"}
    known = groups | {DEFINITIONS, *map(haystack_part, HAYSTACKS), *map(recall_part, RECALLS)}
    for part in (whole.base, whole.mid, whole.sft, whole.long):
        resolved = part.resolve()
        assert checkpoint_bytes(resolved.model.config()) < 24e6  # the tokenizer and the index have 0.7 MB more
        for stage in resolved.stages:
            shares = dict(shard.split("=") for shard in stage.shards)
            assert set(shares) <= known
            tasks = part.data.tasks if stage.tasks is None else stage.tasks
            assert sum(map(float, shares.values())) + tasks == pytest.approx(1, abs=0.011)
    assert [part.data.tasks_loss for part in (whole.base, whole.mid, whole.sft, whole.long)] == ["all"] * 2 + [
        "mask"
    ] * 2
    assert whole.base.model == whole.mid.model == whole.sft.model
    assert whole.long.model.config() == ModelConfig.preset("nano")
    plain = replace(whole.sft.model.config(), rope_scaling=ModelConfig.preset("nano").rope_scaling)
    assert plain == ModelConfig.preset("nano")
    assert [stage.attention for stage in whole.base.stages] == ["dense", "dense", "warmup", "sparse", "sparse"]
    assert whole.base.stages[-1].sequence == whole.sft.stages[-1].sequence == max(HAYSTACKS)
    assert whole.long.stages[0].sequence == max(HAYSTACKS)


def test_resuming_nothing_is_refused(recipe, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no run"):
        recipe(["--resume", "--run-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out")])


def test_a_base_alone_and_a_given_base_are_refused(recipe, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--base-only and --base-model, which leaves out the base"):
        recipe(["--base-only", "--base-model", "nano", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_not_written_over(recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = tmp_path / "run"
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match="holds something else than a model"):
            recipe(["--steps", "2", "--run-dir", str(run), "--out", str(out)])
    assert (tmp_path / "notes.txt").read_text() == "mine" and not run.exists()
