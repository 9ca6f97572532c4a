"""Data of the nano model: definitions, haystacks, and everything else from a corpus to shards."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("reasoning_gym")

sys.path.insert(0, str(Path(__file__).parent))
from nano_corpus import NOUNS, write_corpus

from dsv4.data.nano.build import (
    HAYSTACKS,
    RECALLS,
    NanoData,
    haystack_part,
    load_entries,
    load_words,
    needle_words,
    recall_part,
)
from dsv4.data.nano.definitions import TESTED, TRAINED, training_questions, unseen_wording
from dsv4.data.nano.entries import count_words, read_entries
from dsv4.data.nano.needles import conversation, draw_needles, haystack, hide, repeat
from dsv4.data.shards import ShardFolder
from dsv4.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_entries_are_one_plain_sentence_each(corpus: Path) -> None:
    entries = {entry.term: entry for entry in read_entries(corpus, count_words(corpus))}
    assert entries["glorp"].kind == "verb" and entries["glorp"].answer == "Move slowly and with care."
    assert entries["widget"].answer == "A part of a window that one can press."
    assert (entries["frob"].kind, entries["frob"].meaning) == ("command", "turn the handle of a machine")
    assert entries["ABC"].answer == "Always Be Careful."
    assert entries["tin"].answer == "Soft and silvery metallic element."
    assert "many" not in entries and "two words" not in entries
    assert Counter(entry.kind for entry in entries.values())["noun"] == len(NOUNS)


def test_held_out_entries_and_wordings_are_never_trained(corpus: Path) -> None:
    entries = read_entries(corpus, count_words(corpus))
    asked = [record["messages"][0]["content"] for record in training_questions(entries, seed=1)]
    assert 0 < sum(entry.held_out for entry in entries) < len(entries) / 4
    for entry in entries:
        unseen = {unseen_wording(entry, seed).format(entry.term) for seed in range(9)}
        assert not unseen & set(asked)
        assert entry.held_out != any(wording.format(entry.term) in asked for wording in TRAINED[entry.kind])
    assert all(not set(TRAINED[kind]) & set(TESTED[kind]) for kind in TRAINED)


def test_a_fact_stands_at_its_depth() -> None:
    lines = [f"line {n}" for n in range(10)]
    needles = draw_needles(Random(1), NOUNS, 3)
    text = hide(lines, needles, [0.0, 0.5, 1.0]).splitlines()
    assert [text.index(needle.sentence) for needle in needles] == [0, 6, 12]
    assert [line for line in text if line.startswith("line")] == lines


def test_a_haystack_has_one_answer() -> None:
    test = haystack(Random(3), [f"line {n}" for n in range(20)], NOUNS, depth=0.3)
    assert test.prompt.count(f" is {test.answer}.") == 1
    assert test.question.rstrip("?.").split()[-1] in test.text


def test_turns_of_a_haystack_ask_about_each_fact_once() -> None:
    messages = conversation(Random(2), ["one", "two"], NOUNS, 4)["messages"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(set(answers)) == 4 and all(answer in messages[0]["content"] for answer in answers)


def test_repeated_passages_come_in_another_order() -> None:
    lines = [f"line {n}" for n in range(20)]
    text = repeat(Random(4), lines).splitlines()
    assert text[:20] == lines and sorted(text[20:]) == sorted(lines) and text[20:] != lines


def test_a_corpus_becomes_shards_and_is_not_made_again(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dsv4.data.nano.tokenizer.task_texts", lambda: iter(["a word"]))
    data = NanoData(corpus, tmp_path / "data", scale=0.001)
    data.make()
    tokenizer = Tokenizer.from_pretrained(data.tokenizer)
    for tokens, part in [(n, haystack_part(n)) for n in HAYSTACKS] + [(n, recall_part(n)) for n in RECALLS]:
        lengths = ShardFolder(tmp_path / "data" / "shards" / part).lengths.tolist()
        assert all(tokens // 4 <= length <= tokens for length in lengths), (part, lengths)
    text = tokenizer.decode(ShardFolder(tmp_path / "data" / "shards" / haystack_part(512)).document(0)[0].tolist())
    assert "<｜User｜>" in text and " of " in text
    assert {"chapter", "they"} <= load_words(tmp_path / "data")
    assert len(needle_words(load_entries(tmp_path / "data"))) > 50
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")}
    (tmp_path / "data" / "shards" / "prose" / "index.json").unlink()
    data.make()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")}
    assert {path.parent.name for path in before if before[path] != after[path]} == {"prose"}


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no corpus"):
        NanoData(tmp_path, tmp_path / "data")
    (tmp_path / "train" / "code").mkdir(parents=True)
    (tmp_path / "train" / "code" / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(ValueError, match="no texts of prose"):
        next(NanoData(tmp_path, tmp_path / "data")._lines(512))
