"""Parts of the corpus in the student's fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

pytest.importorskip("reasoning_gym")

from dsv4.data.nano.build import NanoData
from dsv4.data.shards import ShardFolder
from dsv4.post_training.v4_recipe import V4Recipe
from dsv4.post_training.v4_texts import texts_of
from dsv4.training.pretrain_recipe import PretrainRecipe
from dsv4.training.recipe import read_recipe
from recipes import nano, pretrain, sft, v4
from tests.data.nano_corpus import write_corpus

from .small_v4 import small_base


def recipe(corpus: Path | str, *texts: str) -> V4Recipe:
    keys = [f"nano.data.corpus={corpus}", f"student_sft.texts={json.dumps(texts)}", "nano.data.scale=0.001"]
    keys += ["student_sft.tasks=0.1"]
    return v4.read_v4_recipe(v4.RECIPE, nano.RECIPE, ["base_model=b", "sft_model=s", *keys])


def open_texts(corpus: Path, *texts: str) -> NanoData:
    found = texts_of(recipe(corpus, *texts), corpus / "data")
    assert found is not None
    return found.data


def test_the_student_reads_the_corpus_beside_the_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "draw_run", lambda run_dir: None)
    base, corpus = small_base(tmp_path / "small"), write_corpus(tmp_path / "corpus")
    texts = texts_of(recipe(corpus, "prose=0.3", "needles-512=0.2"), tmp_path / "data")
    assert texts is not None
    nano.take_tokenizer(base, texts.data.tokenizer)
    texts.make(lambda text: None)
    assert texts.made.exists() and not texts.data.shards("manuals").exists()
    for part in texts.shares:
        assert ShardFolder(texts.data.shards(part)).lengths.size

    talk = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "1"}]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(talk) + "\n")
    run = tmp_path / "run"
    section = recipe(corpus, "prose=0.3", "needles-512=0.2").student_sft
    words = section.mixture_words(run / sft.SAMPLES, texts.folders())
    words += ["stages.0.tokens=8192", "run.precision=fp32"]
    assert sft.main([str(base), str(tmp_path / "talks.jsonl"), *words, "--run-dir", str(run)]) == 0
    trained = read_recipe(PretrainRecipe, run / "recipe.toml")
    shares = dict(one.rsplit("=", 1) for one in trained.data.shards)
    assert [Path(folder).name for folder in shares] == ["samples", "prose", "needles-512"]
    assert list(shares.values()) == ["0.4", "0.3", "0.2"] and trained.stages[0].sequence == 4096
    assert trained.data.tasks == 0.1


def test_distillation_has_the_texts_and_the_start_teaches_them(tmp_path: Path) -> None:
    run = v4.V4Run(recipe(write_corpus(tmp_path / "corpus"), "prose=0.3"), tmp_path / "run", Mock())
    said = next(run._distill())
    prose = tmp_path / "run" / "nano" / "data" / "shards" / "prose"
    assert f'distillation.texts=["{prose}=0.3"]' in said and f"--teacher texts={run.folders.start}" in said
    without = v4.V4Run(recipe(""), tmp_path / "other", Mock())
    assert "texts" not in next(without._distill())


def test_distillation_has_them_without_fine_tuning(tmp_path: Path) -> None:
    keys = [f"nano.data.corpus={write_corpus(tmp_path / 'corpus')}", "base_model=b", "sft_model=s"]
    found = v4.read_v4_recipe(v4.RECIPE, nano.RECIPE, [*keys, "budget.student_sft=0"])
    assert not found.student_sft.has_length and texts_of(found, tmp_path) is not None


def test_other_texts_are_looked_for_before_the_run(tmp_path: Path) -> None:
    base = small_base(tmp_path / "small")
    keys = [f"base_model={base}", f"sft_model={base}", "nano.data.corpus=", "student.distillation.texts=['no/such']"]
    with pytest.raises(ValueError, match="no/such: no index.json, so these are no shards"):
        v4.check_recipe(v4.read_v4_recipe(v4.RECIPE, nano.RECIPE, keys))


def test_texts_need_a_corpus_and_parts_that_it_has(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    assert texts_of(recipe("", "prose=0.3"), tmp_path) is None
    assert texts_of(recipe(corpus), tmp_path) is None
    with pytest.raises(ValueError, match=r"student_sft.texts has poems; allowed: .*needles-512"):
        open_texts(corpus, "poems=0.3")
    with pytest.raises(ValueError, match=r"texts and student_sft.tasks add up to 1.25; allowed: less than 1"):
        open_texts(corpus, "prose=0.65", "manuals=0.5")
    with pytest.raises(ValueError, match="is no corpus"):
        open_texts(tmp_path / "none", "prose=0.3")


def test_tasks_need_no_corpus(tmp_path: Path) -> None:
    words = recipe("").student_sft.mixture_words(tmp_path / "samples", {})
    assert words == [f'data.shards=["{tmp_path}/samples=0.9"]', "data.tasks=0.1"]
    without = recipe("").student_sft.model_copy(update={"tasks": 0.0})
    assert without.mixture_words(tmp_path / "samples", {}) == []
