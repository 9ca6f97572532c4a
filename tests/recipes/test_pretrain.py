"""Training on a folder of text, end to end: a run killed at any moment goes on to the same losses, to the bit."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

import dsv4
from dsv4.analysis.activations import Recompute
from dsv4.checkpoint.atomic import sole_writer
from dsv4.data.shards import Index
from dsv4.model.stacks import native_tensors
from dsv4.model_folder import nano_path
from dsv4.training import gradient, pretrain_run
from dsv4.training.pretrain_folder import new_run, resume_run
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.pretrain_run import check_ranks, make_model, make_stages, make_trainer, make_values
from dsv4.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "pretrain.py"
STEPS = 20  # of a run that is killed after three
# The recipe, in a process that waits for its signal before the last step but one: it must not end if that is late.
WAITING = f"""
import runpy, sys, time
from dsv4.training.loop import TrainingLoop
stops = TrainingLoop._stops
def stops_later(self, stop):
    while self.progress.step == {STEPS - 2} and not stop.requested:
        time.sleep(0.01)
    return stops(self, stop)
TrainingLoop._stops = stops_later
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIZE = [
    *("stages.0.row_tokens=128", "stages.0.sequence=64", "data.group_rows=4", "run.save_every=2", "run.seed=3"),
    *("data.fill_in_middle=0.3", "data.split_merged=0.3"),
]


@pytest.fixture(scope="module")
def main() -> Any:
    return runpy.run_path(str(RECIPE))["main"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny model and nano's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    config = replace(
        dsv4.ModelConfig.preset("nano"), hidden_size=32, num_hidden_layers=3, num_hash_layers=1, num_attention_heads=2,
        head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8, n_routed_experts=4,
        moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (nano_path() / name).is_file():
            (folder / name).write_bytes((nano_path() / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"Text number {n}.\n\n" + "Some words, and others; the end.\n" * (n + 1))
    return folder


def losses(run: Path) -> list[tuple[int, float, float]]:
    if not (run / "metrics.jsonl").exists():
        return []
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_to_the_same_losses(
    sent: signal.Signals, main: Any, model: Path, texts: Path, tmp_path: Path
) -> None:
    common = [f"model.base={model}", f"data.text={texts}", f"stages.0.steps={STEPS}", *SIZE]
    assert main([*common, "--run-dir", str(tmp_path / "straight"), "--out", str(tmp_path / "a")]) == 0
    run = tmp_path / "killed"
    command = [sys.executable, "-c", WAITING, str(RECIPE), *common]
    command += ["--run-dir", str(run), "--out", str(tmp_path / "b")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while len(losses(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sent)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    done = len(losses(run))
    assert 3 <= done < STEPS
    if sent == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM, said
        assert f"stopped by SIGTERM after step {done} of {STEPS}; the state is saved in {run / 'state.pt'}" in said
        assert torch.load(run / "state.pt")["progress"]["step"] == done
    assert main(["--resume", "--run-dir", str(run), "--out", str(tmp_path / "b"), "--workers", "0"]) == 0
    assert losses(run) == losses(tmp_path / "straight") and len(losses(run)) == STEPS
    for name in ("model.safetensors", "tokenizer.json"):
        files = [sorted((tmp_path / folder).glob(name.replace(".", "*."))) for folder in "ab"]
        assert files[0] and [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert dsv4.load(tmp_path / "a").config.hidden_size == 32


def test_replicas_see_the_batches_of_one_process(main: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    common = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=2", *SIZE]
    for name, replicas in (("one", 1), ("two", 2)):
        arguments = ["stages.0.batch_tokens=256", f"run.replicas={replicas}", "--run-dir", str(tmp_path / name)]
        assert main([*common, *arguments]) == 0
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_ranks_draw_the_values_of_one_process(model: Path, texts: Path, tmp_path: Path) -> None:
    """Tables of hash routing too, one by one, to the bit."""
    console = Console(quiet=True)
    keys = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=1", *SIZE]
    run = new_run(read_recipe(PretrainRecipe, None, keys), tmp_path, console)
    config = dsv4.ModelConfig.from_pretrained(tmp_path)
    begin = run, config, tmp_path, make_stages(run, tmp_path, config, 0)[0]
    want = native_tensors(make_model(*begin, torch.Generator().manual_seed(5)))
    found = dict(make_values(*begin, torch.Generator().manual_seed(5))(want))
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_ranks_train_and_export_as_one_process(main: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    common = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=2", "stages.0.batch_tokens=256", *SIZE]
    assert main([*common, "--run-dir", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RECIPE)]
    command += [*common, "parallel.expert=2", "--run-dir", str(tmp_path / "two")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=550)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one[:2] == pytest.approx(two[:2], rel=1e-6)
        assert one[2] == pytest.approx(two[2], rel=1e-4)
    files = [sorted(path.name for path in (tmp_path / name / "model").iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] and dsv4.load(tmp_path / "two" / "model").config.hidden_size == 32


@pytest.mark.parametrize(
    ("last", "ramp", "words", "same"),
    [
        (4, 2560, ["parallel.data=2"], False),
        (4, 2560, ["parallel.expert=2"], False),
        (4, 2560, ["parallel.context=2", "parallel.pipeline=2"], True),
        (4, 2560, [], True),
        (4, 256, ["parallel.data=2"], True),  # one step of the first size, then full ones
        (2, 0, ["parallel.data=2"], True),
    ],
)
def test_a_batch_that_grows_by_other_steps_on_other_ranks_is_not_resumed(
    last: int, ramp: int, words: list[str], same: bool, model: Path, texts: Path, tmp_path: Path
) -> None:
    console = Console(quiet=True)
    keys = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=30", f"stages.0.batch_tokens={128 * last}"]
    keys += [f"stages.0.ramp_tokens={ramp}", "stages.0.ramp_from=256"] if ramp else []
    new_run(read_recipe(PretrainRecipe, None, [*keys, *SIZE]), tmp_path, console)
    if same:
        resume_run(tmp_path, words)
        return
    with pytest.raises(ValueError, match=r"of 128 tokens on 1 processes .* of 256 on 2, .* allowed: .* of 1, with any"):
        resume_run(tmp_path, words)


def test_all_ranks_count_in_the_rate_of_the_machine(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which MFU divides by: also those of a pipeline and of parts, which have no batches of their own."""
    console = Console(quiet=True)
    keys = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=1", *SIZE]
    keys += [f"parallel.{dimension}=2" for dimension in ("data", "pipeline", "context")]
    run = new_run(read_recipe(PretrainRecipe, None, keys), tmp_path, console)
    monkeypatch.setenv("WORLD_SIZE", "8")
    asked: list[int] = []
    for name, stub in (
        ("product_rate", lambda device, dtype, processes: asked.append(processes) or 1.0),
        ("RankTrainer", lambda *_, **__: None),
        ("on_first_rank", lambda _, work: work()),
    ):
        monkeypatch.setattr(pretrain_run, name, stub)
    make_trainer(run, tmp_path, 0, console)
    assert asked == [8]


def test_a_spike_rolls_the_run_back(model: Path, texts: Path, tmp_path: Path) -> None:
    keys = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=14", *SIZE, "run.count_clamps=true"]
    keys += ["stability.rollback=true", "stability.window=8", "stability.fewest=4", "stability.margin=1"]
    console = Console(quiet=True)
    run = new_run(read_recipe(PretrainRecipe, None, keys), tmp_path, console)
    trainer = make_trainer(run, tmp_path, 0, console)
    trainer.run(stop_after=9)
    with torch.no_grad():
        trainer.model.head.weight *= -100.0
    trainer.run()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["spike_start"], r["to"]) for r in records if "event" in r] == [(10, 9, 8)]
    assert [r["step"] for r in records if r.get("anticipatory")] == [8, 9, 10, 11, 12, 13]
    assert "layers.2.ffn" in records[0]["clamped"]


def test_shards_with_shares_and_changed_data(main: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    for name in ("x=1", "y"):
        source = str(texts) if name == "x=1" else str(texts / "11.txt")
        assert dsv4_data("tokenize", source, "--model", str(model), "--out", str(tmp_path / name)) == 0
    shards = [f"data.shards=['{tmp_path / 'x=1'}=3', '{tmp_path / 'y'}']", "data.tasks=1", f"model.base={model}"]
    run = tmp_path / "run"
    assert main([*shards, "stages.0.steps=1", *SIZE, "--run-dir", str(run)]) == 0
    saved = read_recipe(PretrainRecipe, run / "recipe.toml")
    assert saved.data.shards == (f"{tmp_path / 'x=1'}=3", f"{tmp_path / 'y'}=1")
    with pytest.raises(SystemExit, match="already holds a run"):
        main([*shards, "--run-dir", str(run)])
    with pytest.raises(SystemExit, match="the run's own recipe but for parallel.\\*; without run.seed=4"):
        main(["--resume", "--run-dir", str(run), "run.seed=4"])
    index = tmp_path / "y" / "index.json"
    index.write_text(index.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(SystemExit, match="y holds other data than the run began with"):
        main(["--resume", "--run-dir", str(run)])
    for wrong, message in (
        (["data.shards=a=b"], "shards a=b: FOLDER, or FOLDER=SHARE"),
        ([], "no data: give data.text, data.shards or data.tasks"),
        (["data.text=x", "optimizer.rte=1"], "optimizer.rte is unknown; the nearest key is optimizer.rate"),
        (["a.toml", "b.toml"], "recipes a.toml, b.toml; allowed: one"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([f"model.base={model}", *wrong, "--run-dir", str(tmp_path / "new")])


@pytest.mark.parametrize(("end", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("full"), SystemExit)])
def test_ctrl_c_keeps_the_text_that_was_tokenized_an_error_nothing(
    end: BaseException, raised: type, main: Any, model: Path, texts: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    words = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=1", *SIZE, "--run-dir", str(run)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(raised):
        patch.setattr(Index, "write", Mock(side_effect=end))  # behind the last shard
        main(words)
    kept = [path.stat().st_mtime_ns for path in run.rglob("*.arrow")]
    assert bool(kept) == ("the same command goes on after the text" in capsys.readouterr().err) == run.exists()
    assert bool(kept) == isinstance(end, KeyboardInterrupt)
    assert main(words) == 0
    assert not kept or kept == [path.stat().st_mtime_ns for path in run.rglob("*.arrow")]


def test_a_tokenizer_that_lies_in_the_runs_folder_stays(main: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    """The run's own, given as data.tokenizer; not one of other files, which is refused."""
    own = tmp_path / "run" / "tokenizer"
    words = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=1", *SIZE, "--run-dir", str(own.parent)]
    own.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).write_bytes((model / name).read_bytes())
    (own / "tokenizer_config.json").write_text("{}")
    (own / "notes.txt").write_text("mine")
    for more in ([], [f"data.tokenizer={own}"]):
        with pytest.raises(SystemExit, match=f"{own} holds something else than a copy of .*; rename it"):
            main([*words, *more])
        assert (own / "notes.txt").read_text() == "mine" and (own / "tokenizer_config.json").read_text() == "{}"
    (own / "notes.txt").unlink()
    with pytest.raises(SystemExit, match=f"{own} holds something else"):
        main(words)
    assert main([*words, f"data.tokenizer={own}"]) == 0
    assert (own / "tokenizer_config.json").read_text() == "{}"
    assert (own.parent / "model" / "tokenizer_config.json").read_text() == "{}"


def test_a_run_that_was_moved_goes_on(main: Any, model: Path, texts: Path, tmp_path: Path) -> None:
    """With the shards of its own text and others that lie in its folder; from a column that is named."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"said": path.read_text()}) + "\n" for path in sorted(texts.iterdir())))
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert dsv4_data("tokenize", str(texts), "--model", str(model), "--out", str(run / "more")) == 0
    keys = [f"model.base={model}", f"data.text={rows}", "data.column=said", f"data.shards={run / 'more'}=2", *SIZE]
    assert main([*keys, "stages.0.steps=1", "--run-dir", str(run)]) == 0
    assert json.loads((run / "data.json").read_text()).keys() == {"more", "shards"}
    run.rename(moved)
    (moved / "state.pt").unlink()
    before = losses(moved)
    assert main(["--resume", "--run-dir", str(moved)]) == 0
    assert losses(moved) == before


def test_shards_that_a_run_cannot_read_are_refused_before_it_begins(
    main: Any, model: Path, texts: Path, tmp_path: Path
) -> None:
    """Also where no tables of hash routing are counted in them, as in a run that goes on from a model."""
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert dsv4_data("tokenize", str(texts), "--model", str(model), "--out", str(shards)) == 0
    keys = [f"model.start={nano_path()}", *SIZE, "stages.0.steps=1", "--run-dir", str(run)]
    for share, message in (
        ("0", "the share is 0; more than 0"),
        ("inf", "the share is inf"),
        ("nan", "the share is nan"),
    ):
        with pytest.raises(SystemExit, match=f"shards {shards}={share}: {message}"):
            main([*keys, f"data.shards={shards}={share}"])
    with pytest.raises(SystemExit, match="stage 'pretrain' has no data"):
        main([*keys, "data.tasks=1", "stages.0.tasks=0"])
    with pytest.raises(SystemExit, match=r"lora\.targets"):
        main([*keys, f"data.shards={shards}", "lora.rank=2", "lora.targets=[]"])
    path = next(shards.glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=f"{path} has .* bytes; the index has it with"):
        main([*keys, f"data.shards={shards}"])
    assert not run.exists()


def test_a_folder_in_which_another_process_trains_is_left_alone(
    main: Any, model: Path, texts: Path, tmp_path: Path
) -> None:
    keys = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=1", *SIZE, "--run-dir", str(tmp_path / "run")]
    with sole_writer(tmp_path / "run"), pytest.raises(SystemExit, match="another process works in .*run; wait"):
        main(keys)
    assert not (tmp_path / "run").exists()


def test_an_output_that_would_replace_something_else_is_refused_before_the_run(
    main: Any, model: Path, texts: Path, tmp_path: Path
) -> None:
    """A folder of the user's, the run's own, one above it; of an adapter's run the model that it is for."""
    mine, run = tmp_path / "mine" / "notes.txt", tmp_path / "runs" / "new"
    mine.parent.mkdir()
    mine.write_text("mine")
    words = [f"model.base={model}", f"data.text={texts}", "stages.0.steps=1", *SIZE, "--run-dir", str(run)]
    adapter = [f"model.start={nano_path()}", "lora.rank=1"]
    for out, more, message in (
        (mine.parent, [], "holds something else than a model"),
        (mine, [], "holds something else than a model"),
        (mine / "model", [], f"no folder: {mine}"),
        (run, [], "holds the run's folder"),
        (run.parent, [], "holds the run's folder"),
        (nano_path(), adapter, "is the model that the adapter is for"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*words[bool(more) :], *more, "--out", str(out)])
    assert mine.read_text() == "mine" and not run.exists()


def test_all_phases_of_a_recipe_file_in_one_run(
    main: Any, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'''
        data = {{text = "{texts}", group_rows = 4}}
        model = {{base = "{model}"}}

        [[stages]]
        name = "short"
        attention = "dense"
        sequence = 32
        row_tokens = 64
        tokens = 300
        batch_tokens = 128
        ramp_from = 64
        ramp_tokens = 128

        [[stages]]
        name = "warm"
        attention = "warmup"
        sequence = 64
        row_tokens = 64
        steps = 1
        rate = 2e-3

        [[stages]]
        name = "long"
        sequence = 128
        row_tokens = 128
        steps = 2
        recompute = "blocks"
        '''
    )
    policies: list[Recompute] = []
    recomputing = gradient.recomputing

    def spy(model: torch.nn.Module, policy: Recompute) -> Any:
        policies.append(policy)
        return recomputing(model, policy)

    monkeypatch.setattr(gradient, "recomputing", spy)
    run = tmp_path / "run"
    assert main([str(recipe), "optimizer.rate=1e-3", "--run-dir", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["short"] * 4 + ["warm"] + ["long"] * 2
    assert [row["indexer_loss"] > 0 for row in rows] == [False] * 4 + [True] * 3
    assert rows[4]["lr"] == 2e-3
    assert policies == ["none"] * 5 + ["blocks"] * 2
    taken = [row["tokens"] - before for row, before in zip(rows, [0, *(row["tokens"] for row in rows)], strict=False)]
    assert taken[0] <= 64 < taken[3] <= 128
    assert json.loads((run / "model" / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_ladder_trains_dense_then_the_indexer_then_sparse_on_longer_documents(model: Path, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"Line {line} of text {number}." for line in range(150)))
    words = [
        *(f"model.base={model}", f"data.text={tmp_path}/*.txt", "data.group_rows=4", "optimizer.warmup_steps=1"),
        *("data.fill_in_middle=0", "data.split_merged=0"),
        *("ladder.tokens=20480", "ladder.context=512", "ladder.batch_tokens=8192", "run.quantized_share=0"),
        *("ladder.dense=0.4", "ladder.warmup=0.2", "ladder.longest=0.2", "ladder.ramp_from=0.5"),
    ]
    run, console = tmp_path / "run", Console(quiet=True)
    made = new_run(read_recipe(PretrainRecipe, None, words), run, console)
    trainer = make_trainer(made, run, 0, console)
    names = {True: set(), False: set()}  # parameters of indexers, and all others
    for name, _ in trainer.model.named_parameters():
        names[".indexer." in name].add(name)
    stages, changed = [], []
    for stop in (2, 3, 4, 5):
        before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
        trainer.run(stop)
        stages.append(trainer.progress.stage)
        found = {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])}
        changed.append([bool(found & names[kind]) for kind in (True, False)])
    assert trainer.finished and stages == [0, 1, 2, 3]
    assert changed == [[False, True], [True, False], [True, True], [True, True]]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["dense-256"] * 2 + ["warmup", "sparse-256", "sparse-512"]
    assert [row["indexer_loss"] > 0 for row in rows] == [False, False, True, True, True]
    assert rows[0]["tokens"] <= 4096 < rows[1]["tokens"] - rows[0]["tokens"] and rows[2]["lr"] == 1e-3
    longest = [max(map(len, stage.source.batch(0).documents)) for stage in trainer.stages]
    assert longest == [256, 256, 256, 512]


def test_a_printed_config_is_a_recipe_of_the_same_run(main: Any, model: Path, tmp_path: Path, capsys: Any) -> None:
    words = [f"model.base={model}", "ladder.tokens=1000000", "ladder.context=16384", "--print-config"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(printed)
    assert main([str(tmp_path / "printed.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert 'name = "warmup"' in printed and "hidden_size = 32" in printed


def dsv4_data(*arguments: str) -> int:
    from dsv4.cli import main as cli

    return cli(["data", *arguments])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.data=2"], "for 2 ranks: start it by torchrun"),
        (["parallel.expert=7"], "divisors of the"),
        (["parallel.pipeline=99"], "up to the"),
        (["parallel.stages=[1, 2]"], "numbers that add up"),
        (["parallel.data=2", "run.replicas=2"], "run.replicas 2 on 2 ranks"),
    ],
)
def test_ranks_and_settings_of_one_process_are_refused(words: list[str], said: str) -> None:
    recipe = read_recipe(PretrainRecipe, None, words)
    if said.startswith("for"):
        with pytest.raises(ValueError, match=said):
            check_ranks(recipe)
    else:
        with pytest.raises(ValueError, match=said):
            recipe.resolve()


def test_adapters_and_rollbacks_go_with_ranks_of_every_kind() -> None:
    words = [f"parallel.{name}=2" for name in ("data", "context", "pipeline", "expert")]
    rolled_back = read_recipe(PretrainRecipe, None, [*words, "stability.rollback=true"]).resolve()
    assert rolled_back.stability.anticipate == "after_rollback"
    recipe = read_recipe(PretrainRecipe, None, [*words, "model.start=nano", "lora.rank=4"]).resolve()
    assert recipe.parallel.degrees().ranks == 16 and recipe.lora.rank == 4


@pytest.mark.parametrize(
    ("device", "said"), [("gpu", "allowed: cpu, cuda"), ("meta", "allowed: cpu, cuda"), ("cuda:99", "torch finds")]
)
def test_devices_that_are_not_here_are_refused(device: str, said: str, tmp_path: Path, main: Any) -> None:
    with pytest.raises(SystemExit, match=said):
        main([f"run.device={device}", "data.text=docs", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
