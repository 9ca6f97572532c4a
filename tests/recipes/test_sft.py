"""`dsv4 train sft` from the command line: dry run, run, resume, wrong input."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from rich.console import Console

from dsv4.checkpoint.atomic import sole_writer
from dsv4.config import ModelConfig, nano_path
from dsv4.data.shards import ShardFolder
from dsv4.engine import LLM, SamplingParams
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.training import pretrain_run
from dsv4.training.export import export_model
from dsv4.training.plan import CALIBRATION_STEPS
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.pretrain_run import make_source
from dsv4.training.sources import MixtureSource
from recipes import pretrain, sft
from tests.data.test_records import native_rows
from tests.post_training.small_policy import small_policy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder."""
    root = tmp_path_factory.mktemp("small")
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Eight conversations, one of two thinking turns, and a line that is none."""
    path = tmp_path / "talks.jsonl"
    thinks = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    lines = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]}
        for n in range(7)
    ]
    lines.append({"messages": [{"role": "user", "content": "2+2"}, thinks] * 2})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{oops\n")
    return path


def test_the_dry_run_shows_samples_and_refusals(folder: Path, talks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.main([str(folder), str(talks), "--dry-run", "1"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "messages[1]" in output and ":9: no JSON" in output and "9 samples" in output and "1 refused" in output
    talks.write_text("{oops\n" * 21)
    for words in ("0", "1 --ids"):
        assert sft.main([str(folder), str(talks), "--dry-run", *words.split()]) == 1
        assert (":21: no JSON" in capsys.readouterr().out) == (words == "0")


def test_the_printed_config_makes_no_run(
    folder: Path, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert sft.main([str(folder), str(talks), "--print-config", "--run-dir", str(run)]) == 0
    assert not run.exists()
    recipe = tomllib.loads(capsys.readouterr().out)
    assert recipe["data"]["shards"] == [str(run / "samples")] and recipe["stages"][0]["name"] == "sft"


def make_run(words: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PretrainRecipe, MixtureSource]:
    """The run of a command, up to its first step."""
    monkeypatch.setattr(pretrain, "_train", lambda options, rank: given.append(options) or 0)
    given: list[argparse.Namespace] = []
    assert sft.main([*words, "--run-dir", str(run)]) == 0
    recipe = pretrain.new_run(pretrain.given_recipe(given[0].recipe), run, Console(quiet=True))
    return recipe, make_source(recipe, 0, run, ModelConfig.from_pretrained(run), 0)


@pytest.mark.parametrize("count", [9, 150])
def test_each_sample_comes_whole_and_once_in_each_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Whether they fill less than a group of rows or more; in rows in which no two may have room."""
    random, path = Random(count), tmp_path / "talks.jsonl"
    talks = [
        [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "the " * random.randint(60, 135)}]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    keys = ["--max-tokens", "150", "--epochs", "2", "stages.0.row_tokens=200", "data.group_rows=8"]
    recipe, source = make_run([str(folder), str(path), *keys], tmp_path / "run", monkeypatch)
    assert recipe.data.whole_documents
    shards = ShardFolder(tmp_path / "run" / "samples")
    known = Counter(tuple(shards.document(number)[0].tolist()) for number in range(count))
    assert max(map(len, known)) > 128 or count == 9  # longer than a multiple of the compression windows
    steps = recipe.stages[0].num_steps(1)
    first = source.open().epoch_rows(1)
    assert source.open().epoch_rows(2) == steps
    for rows in (range(first), range(first, steps)):
        assert Counter(tuple(ids) for number in rows for ids in source.batch(number).documents) == known


def test_beside_other_data_the_run_has_the_tokens_of_its_epochs(
    folder: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(folder), str(talks), "--epochs", "50", "data.tasks=1", "--max-tokens", "512"]
    recipe, source = make_run(words, tmp_path / "run", monkeypatch)
    masks = [mask for number in range(8) for mask in source.batch(number).loss_masks]
    assert all(mask[0] == 0 < sum(mask) for mask in masks), "questions of the tasks are no targets either"
    assert recipe.stages[0].tokens == 50 * ShardFolder(tmp_path / "run" / "samples").index.counts.tokens
    recipe, _ = make_run([*words, "stages.0.steps=3"], tmp_path / "three", monkeypatch)
    assert recipe.stages[0].num_steps(1) == 3
    with pytest.raises(SystemExit, match="stages.0.sequence is 64, at which samples of up to 512 tokens would be cut"):
        sft.main([*words, "stages.0.sequence=64", "--run-dir", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="whole_documents with fill_in_middle 0.5"):
        sft.main([*words, "data.fill_in_middle=0.5", "--run-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_it_trains_resumes_and_is_served(
    folder: Path, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, short = tmp_path / "run", ["stages.0.row_tokens=128", "run.save_every=1"]
    words = [str(folder), str(talks), *short, "--max-tokens", "128", "--epochs", "2", "--run-dir", str(run)]
    assert sft.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "9 samples" in said and "; 1 refused refused" in said and ":9: no JSON" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(line["stage"] == "sft" for line in lines)
    (output,) = LLM(run / "model").generate("Hi", SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3
    with pytest.raises(SystemExit, match="already holds a run; pass --resume"):
        sft.main(words)
    assert sft.main(["--resume", "--run-dir", str(run), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "config.json").is_file()


def test_a_table_with_native_columns_trains_as_its_json_lines(folder: Path, tmp_path: Path) -> None:
    rows = native_rows()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents: list[list[tuple[list[int], list[int]]]] = []
    for name in ("a.jsonl", "a.parquet"):
        run = tmp_path / f"run-{name}"
        words = [str(folder), str(tmp_path / name), "--max-tokens", "1024", "stages.0.row_tokens=1024"]
        assert sft.main([*words, "--run-dir", str(run)]) == 0
        assert (run / "model" / "config.json").is_file() and (run / "metrics.jsonl").read_text()
        shards = ShardFolder(run / "samples")
        pairs = [shards.document(number) for number in range(len(shards))]
        documents.append([(ids.tolist(), [] if mask is None else mask.tolist()) for ids, mask in pairs])
    assert documents[0] == documents[1] and len(documents[0]) == 3


def test_a_budget_of_seconds_is_the_length_of_a_run(folder: Path, talks: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [str(folder), str(talks), "--max-tokens", "128", "stages.0.row_tokens=128", "run.seconds=0.01"]
    assert sft.main([*words, "--run-dir", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == CALIBRATION_STEPS + 1


def test_lora_keys_work(folder: Path, talks: Path, tmp_path: Path) -> None:
    words = [str(folder), str(talks), "lora.rank=2", "--max-tokens", "128", "--run-dir", str(tmp_path / "run")]
    assert sft.main([*words, "stages.0.row_tokens=128"]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_wrong_input_is_named(folder: Path, talks: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{oops\n")
    for words, message in (
        ([], "no model; give the folder of one, and data"),
        ([str(folder)], "no data; give files or folders"),
        ([str(folder), str(tmp_path / "none.jsonl")], "no such file or folder"),
        ([str(folder), str(empty)], f"no sample is left: 1 refused, the first {empty}:1: no JSON"),
        ([str(folder), str(talks), "--out", str(tmp_path)], "holds something else than a model"),
        ([str(folder), str(talks), "optimizer.rat=1"], "the nearest key is optimizer.rate"),
        ([str(folder), str(talks), "--ids"], "--ids shows the tokens of a dry run"),
        ([str(folder), "--resume"], "--resume goes on with the run's own model"),
    ):
        with pytest.raises(SystemExit, match=message):
            sft.main([*words, "--run-dir", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        (tmp_path / "state.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sft.main(["--resume", "--run-dir", str(tmp_path)])
    assert f"dsv4 train sft --resume --run-dir {tmp_path}" in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_what_was_there(
    folder: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("too large a model")

    run = tmp_path / "run"
    run.mkdir()
    (run / "notes").touch()
    monkeypatch.setattr(pretrain_run, "make_model", fail)
    with pytest.raises(SystemExit, match="too large a model"):
        sft.main([str(folder), str(talks), "--run-dir", str(run)])
    assert [path.name for path in run.iterdir()] == ["notes"]


def test_a_call_that_makes_no_run_removes_no_samples(folder: Path, talks: Path, tmp_path: Path) -> None:
    """Neither those of the user, nor those of another process that is writing them."""
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    mine = talks.rename(samples / "talks.jsonl")
    place = ["--run-dir", str(tmp_path / "run")]
    sft.main([str(folder), str(mine), "--dry-run", "1", *place])
    sft.main([str(folder), str(mine), "--print-config", *place])
    with pytest.raises(SystemExit, match="no data"):
        sft.main([str(folder), *place])
    with sole_writer(tmp_path / "run"), pytest.raises(SystemExit, match="another process works in"):
        sft.main([str(folder), str(mine), *place])
    assert mine.is_file()


def test_a_run_folder_may_have_any_name(folder: Path, talks: Path, tmp_path: Path) -> None:
    run = tmp_path / "rate=1e-3"
    run.mkdir()
    own = talks.rename(run / "talks=8.jsonl")
    assert (
        sft.main([str(folder), str(own), "stages.0.row_tokens=128", "--max-tokens", "128", "--run-dir", str(run)]) == 0
    )
    assert (run / "model" / "config.json").is_file()


def test_an_output_that_cannot_be_written_is_refused_before_the_run(
    folder: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != read_only and allowed(path, mode))
    words = [str(folder), str(talks), "--run-dir", str(tmp_path / "run"), "--out", str(read_only / "a" / "model")]
    with pytest.raises(SystemExit, match=f"no right to write in {read_only}; give another --out"):
        sft.main(words)


@pytest.mark.slow
def test_one_of_two_ranks_writes_the_samples(folder: Path, talks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dsv4"]
    words = ["train", "sft", str(folder), str(talks), "--max-tokens", "128", "--run-dir", str(tmp_path / "run")]
    keys = ["stages.0.row_tokens=128", "parallel.data=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 500}
    ended = subprocess.run([*command, *words, *keys], **arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("9 samples") == 1
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    talks.write_text("{oops\n")
    ended = subprocess.run([*command, *words[:-1], str(tmp_path / "other"), *keys], **arguments)
    assert ended.returncode != 0 and "rank 0 stopped: " in ended.stderr and "no sample is left" in ended.stderr
