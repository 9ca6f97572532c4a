"""The nano model's evaluation beyond its tasks, on a tiny model and a tiny corpus."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")

import dsv4

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from nano_corpus import write_corpus

from dsv4.checkpoint import save_model
from dsv4.data.nano.build import NanoData
from dsv4.data.nano.definitions import TESTED
from dsv4.data.nano.entries import Entry
from dsv4.data.tasks.chat import BEYOND, TALK, UNKNOWN
from dsv4.evals import nano_suite
from dsv4.evals.bits_per_byte import Compressed, compress, pooled_bits
from dsv4.evals.definitions import make_choices
from dsv4.evals.ledger import Ledger
from dsv4.evals.likelihood import log_likelihoods
from dsv4.evals.nano_suite import PARTS, SuiteReport, SuiteSettings, run_suite
from dsv4.evals.open_questions import QUESTIONS, is_plain_english
from dsv4.model.transformer import Transformer
from dsv4.tokenizer import Tokenizer
from dsv4.training.export import export_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SuiteSettings:
    folder = tmp_path_factory.mktemp("suite")
    corpus = write_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.data.nano.tokenizer.task_texts", lambda: iter(["a word"]))
        NanoData(corpus, folder / "data", scale=0.001).make()
    return SuiteSettings(corpus, folder / "data", folder / "ledger.jsonl", 1, (256, 512), 8, 500)


@pytest.fixture(scope="module")
def model(settings: SuiteSettings) -> Path:
    """Folder of a tiny model with random weights."""
    config = replace(
        dsv4.ModelConfig.preset("nano"), vocab_size=8192, hidden_size=32, num_hidden_layers=3, num_hash_layers=1,
        num_attention_heads=2, q_lora_rank=16, o_lora_rank=16, index_n_heads=2, index_topk=8, n_routed_experts=4,
        moe_intermediate_size=16, compress_ratios=(0, 4, 128, 0),
    )  # fmt: skip
    made = Transformer(config)
    made.init_weights(torch.Generator().manual_seed(1))
    export_model(made, settings.data / "tokenizer", settings.data.parent / "model")
    return settings.data.parent / "model"


def test_all_parts_are_reported_and_a_killed_call_goes_on(model: Path, settings: SuiteSettings, monkeypatch) -> None:
    monkeypatch.setattr("dsv4.evals.open_questions.QUESTIONS", {"small talk": ("Nice day.",), "now": ("How late?",)})
    report = run_suite(model, PARTS, settings)
    text = report.to_markdown()
    assert (
        "| never asked in training |" in text and "| 512 |" in text and "| all |" in text and "| small talk |" in text
    )
    assert SuiteReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    for name in ("definitions._count_right", "needles.answer_tests", "bits_per_byte.text_bits", "open_questions.ask"):
        place, function = name.split(".")
        monkeypatch.setattr(getattr(nano_suite, place), function, lambda *a: pytest.fail("computed again"))
    assert run_suite(model, PARTS, settings) == report


def test_likelihoods_are_those_of_the_logits(model: Path) -> None:
    loaded = dsv4.load(model)
    sequences, starts = [[0, 5, 9, 7, 300], [0, 8], [0, *range(400, 540)]], [2, 1, 100]
    found = log_likelihoods(loaded, sequences, starts)
    for ids, start, value in zip(sequences, starts, found, strict=True):
        with torch.no_grad():
            logs = loaded(torch.tensor([ids]))[0].log_softmax(-1)
        assert value == pytest.approx(sum(float(logs[n - 1, ids[n]]) for n in range(start, len(ids))), rel=1e-4)
    with pytest.raises(ValueError, match="allowed: 1 to 1"):
        log_likelihoods(loaded, [[0, 5]], [2])


def test_bits_count_every_byte_in_pieces_of_any_length(model: Path) -> None:
    loaded, tokenizer = dsv4.load(model), Tokenizer.from_pretrained(model)
    text = "The same line, and again the same line.\n" * 20
    long, short = (compress(loaded, tokenizer, "x", text, context) for context in (4096, 64))
    ids = tokenizer.encode(text)
    for part in (long, short):  # random weights: about log2 of the vocabulary per token
        assert part.num_bytes == len(text) and part.model_bits == pytest.approx(13 * len(ids), rel=0.1)
    assert long.xz < 2
    assert pooled_bits([Compressed("a", 10, 5, 40), Compressed("b", 30, 35, 40)]).model == 1.0


def test_plain_english_is_known_words_with_an_end() -> None:
    words = frozenset(["i", "do", "not", "know", "that", "you", "have", "told", "me", "it's"])
    assert is_plain_english("I do not know that.", words) and is_plain_english("It's that!", words)
    for wrong in ("", "12", "I do not flurb.", "I know 3.", "I do not know", "know <b>that</b>.", "know. " * 100):
        assert not is_plain_english(wrong, words), wrong


def test_open_questions_are_many_and_in_no_training_data() -> None:
    asked = [question for questions in QUESTIONS.values() for question in questions]
    assert len(set(asked)) == len(asked) >= 100
    trained = {wording.lower().strip(" .?!") for part in (TALK, BEYOND, UNKNOWN) for i in part for wording in i.asked}
    assert not trained & {question.lower().strip(" .?!") for question in asked}


def test_a_ledger_is_of_one_model_and_corpus(model: Path, settings: SuiteSettings, tmp_path: Path) -> None:
    own = replace(settings, ledger=tmp_path / "ledger.jsonl")
    report = run_suite(model, ["bytes"], own)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    trained = Transformer(dsv4.load(model).config)
    trained.init_weights(torch.Generator().manual_seed(2))
    save_model(trained, trained.config, other, "official", overwrite=True)
    with pytest.raises(ValueError, match="results of another model; allowed: a new file"):
        run_suite(other, ["bytes"], own)
    corpus = shutil.copytree(settings.corpus, tmp_path / "corpus")
    next((corpus / "validation").glob("*/*.jsonl")).write_text('{"text": "Another text."}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="results of another corpus"):
        run_suite(model, ["bytes"], replace(own, corpus=corpus))
    assert run_suite(model, ["bytes"], own) == report


def test_a_cut_line_of_a_ledger_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"model": "a"}).put("one", 1)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "two", "va')
    again = Ledger(path, {"model": "a"})
    assert again.get("one") == 1 and again.get("two") is None
    again.put("two", 2)
    assert Ledger(path, {"model": "a"}).get("two") == 2
    path.write_text('{"key": "one", "value": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="does not begin with the origin"):
        Ledger(path, {"model": "a"})


def test_every_part_runs_on_the_device_that_is_asked_for(
    model: Path, settings: SuiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def load(*arguments: object, device: str = "cpu", **named: object) -> None:
        raise Asked(device)

    monkeypatch.setattr(nano_suite, "LLM", load)
    monkeypatch.setattr(nano_suite.dsv4, "load", load)
    monkeypatch.setattr(nano_suite, "check_device", lambda device: None)
    for part in PARTS:
        with pytest.raises(Asked, match="cuda"):
            run_suite(model, [part], replace(settings, ledger=None, device="cuda"))


def test_an_unknown_device_is_refused_first(model: Path, settings: SuiteSettings) -> None:
    with pytest.raises(ValueError, match="abacus"):
        run_suite(model, PARTS, replace(settings, device="abacus"))


def test_the_neutral_question_differs_in_its_term_alone() -> None:
    """Also where the question's own words have the term in them: "wthis" is no word."""
    entries = [Entry(term, "noun", f"meaning {n}") for n, term in enumerate(("hat", "fine", "word", "a", "you", "ink"))]
    entries = [entry for entry in entries if not entry.held_out]
    choices = make_choices(entries, False, 99)
    assert len(choices) == len(entries) >= 4
    for choice in choices:
        known = {wording.format("this") for wording in TESTED["noun"]}
        assert choice.neutral in known and choice.question != choice.neutral
