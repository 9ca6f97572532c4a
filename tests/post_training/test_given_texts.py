"""Texts beside a student's samples: the same in any order, held to their teacher, in the recipe and when it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4.config import nano_path
from dsv4.data.records import find_sources
from dsv4.data.tokenizing import ShardWriter
from dsv4.kernels import backends
from dsv4.post_training.distillation import DistillationRun, DistillationSettings
from dsv4.post_training.given_texts import TEXTS, GivenTexts
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.training.export import export_model
from dsv4.training.schedule import Schedule
from recipes import distill

from .small_policy import TextProblems, has_f, small_policy

LOOP = LoopSettings(steps=6, schedule=Schedule(0.005, 0, 0.0), prompts=4, max_tokens=12, save_every=1)
TOKENS = 300


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for number in range(30):
        (root / f"{number}.txt").write_text(f"Text {number}. " + "Some words of it, and others. " * (number + 1))
    ShardWriter(find_sources([str(root)]), nano_path(), root / "shards").run()
    return root / "shards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student as it begins."""
    root = tmp_path_factory.mktemp("student")
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of its samples, which knows other texts than the student does."""
    root, (policy, _) = tmp_path_factory.mktemp("teacher"), small_policy()
    with torch.no_grad():
        policy.model.norm.weight.mul_(6.0)
    export_model(policy.model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def texts(shards: Path, folder: Path) -> GivenTexts:
    return GivenTexts({shards: 1.0}, TOKENS, folder, seed=3)


def test_a_step_has_the_same_documents_whenever_it_is_asked_for(shards: Path, folder: Path) -> None:
    given = texts(shards, folder)
    steps = [given.of_step(step) for step in range(8)]
    assert texts(shards, folder).of_step(5) == steps[5] != steps[4]
    for documents in steps:
        assert 0.8 * TOKENS < sum(one.num_document for one in documents) <= TOKENS
        assert all(list(one.places) == list(range(1, one.num_document)) for one in documents)


@pytest.mark.parametrize("estimate", ["full", "sampled"])
def test_a_student_stays_near_the_teacher_of_its_texts(
    estimate: str, shards: Path, folder: Path, teacher: Path, tmp_path: Path
) -> None:
    far = {}
    for weight in (1e-9, 3.0):
        run = make_run(tmp_path / str(weight), shards, folder, teacher, weight, estimate)
        run.run()
        lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        far[weight] = lines[-1]["kl_by_teacher"][TEXTS]
        first = lines[0]["kl_by_teacher"]
        assert first["letters"] > 0.1 and lines[0]["kl"] == first["letters"], "texts are no samples"
        assert lines[0]["tokens"] <= LOOP.prompts * LOOP.max_tokens < TOKENS < lines[0]["trained_tokens"]
        if backends.native_module() is not None:
            assert first[TEXTS] == 0.0 and {line["train_serve_difference"] for line in lines} == {0.0}
        assert all(line["kl_by_teacher"][TEXTS] > -1e-6 for line in lines), "it is over the full vocabulary"
    if estimate == "full":  # by the sampled one the student learns little
        assert far[3.0] < 0.5 * far[1e-9]


def test_a_killed_run_resumes_to_the_same_bits(shards: Path, folder: Path, teacher: Path, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", shards, folder, teacher, 1.0)
    whole.run()
    for stop in (2, None):
        run = make_run(tmp_path / "parts", shards, folder, teacher, 1.0)
        run.run(stop)
    want = dict(whole.policy.model.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in run.policy.model.named_parameters())


def make_run(
    run_dir: Path, shards: Path, folder: Path, teacher: Path, weight: float, estimate: str = "full"
) -> DistillationRun:
    policy, optimizer = small_policy()
    teachers = {"letters": Teacher(teacher), TEXTS: Teacher(folder, weight)}
    settings = DistillationSettings(balance=0.0, indexer=0.0, micro_tokens=200)
    settings = replace(settings, estimate=estimate)
    return DistillationRun(
        policy, optimizer, TextProblems(has_f), Teachers(teachers, run_dir / "hidden", policy.model.config.vocab_size),
        LOOP, settings, run_dir, quiet=True, texts=texts(shards, folder),
    )  # fmt: skip


def test_the_recipe_has_texts_and_goes_on_with_the_same(shards: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    data, run, own = tmp_path / "rows.jsonl", tmp_path / "run", tmp_path / "shards"
    data.write_text('{"prompt": "Say 1"}\n{"prompt": "Say 2"}\n')
    own.mkdir()
    for path in shards.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    words = [str(folder), f"problems.data={data}", f"distillation.texts={own}", "distillation.text_tokens=200"]
    words += ["--teacher", f"data={folder}", "run.steps=2", "sampling.prompts=2", "sampling.max_tokens=5"]
    words += ["sampling.max_model_len=512", "--run-dir", str(run)]
    assert distill.main(words) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["kl_by_teacher"].keys() == {"data", TEXTS} for line in lines)
    assert distill.main(["--resume", "--run-dir", str(run)]) == 0
    more = tmp_path / "more.txt"
    more.write_text("Another text.")
    ShardWriter(find_sources([str(more)]), nano_path(), tmp_path / "other").run()
    for path in own.iterdir():
        path.unlink()
    for path in (tmp_path / "other").iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SystemExit, match="distillation.texts are not what the run in .* began with"):
        distill.main(["--resume", "--run-dir", str(run)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distillation.texts=none"], "none"),
        (["distillation.texts=['a', 'a=2']"], "texts has a folder twice: a, a; allowed: once, with its share"),
        (["distillation.texts=['a=1', './a=2']"], "texts has a folder twice: a, ./a; allowed: once, with its share"),
        (["distillation.text_tokens=1"], "distillation.text_tokens is 1"),
        (["--teacher", "texts=models/nano"], "teachers of no problem that is asked: texts; allowed: data, default"),
    ],
)
def test_wrong_texts_are_named(words: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Say 1"}\n')
    given = [str(folder), f"problems.data={data}", "--teacher", f"data={folder}", *words]
    with pytest.raises(SystemExit, match=message):
        distill.main([*given, "--run-dir", str(tmp_path / "run")])
