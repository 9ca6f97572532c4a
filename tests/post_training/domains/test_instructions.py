"""Instructions: each check against texts that keep and break it; questions are pure, split, and solvable."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dsv4.data.tasks import split_of
from dsv4.post_training.domains.constraints import KINDS, Constraint, sentences_of, words_of
from dsv4.post_training.domains.instructions import InstructionFollowing, Instructions

SCHEMA = json.dumps({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
CASES = [
    ("words", 3, "It's a cat", "a cat"),
    ("words_least", 3, "one two three four", "one two"),
    ("words_most", 2, "one-two", "one two three"),
    ("sentences", 2, "One. Two!", "One. Two! ... Three?"),
    ("lines", 2, "a\n\nb\n", "a"),
    ("bullets", 2, "- a\n- b", "- a\n- b\nc"),
    ("letters", "e 2", "Eel", "eel e"),
    ("include", "cat", "A Cat.", "cats"),
    ("include_times", "cat 2", "cat, Cat", "cat"),
    ("avoid", "cat", "cats", "the CAT"),
    ("avoid_letter", "x", "abc", "aXe"),
    ("lower", None, "abc 1", "Abc"),
    ("upper", None, "ABC 1", "ABc"),
    ("starts", "the", '"The end', "end the"),
    ("ends", "red bags.", "He has red bags.\n", "He has red bags. Yes"),
    ("no_commas", None, "a b", "a, b"),
    ("quoted", None, '"a b"\n', '"a" "b"'),
    ("json", SCHEMA, '{"age": 3}', '```{"age": 3}```'),
    ("json", SCHEMA, '{"age": 3}', '{"age": "3"}'),
    ("json", SCHEMA, '{"age": 3}', "[" * 100_000),
]


@pytest.mark.parametrize(("kind", "value", "kept", "broken"), CASES)
def test_checks(kind: str, value: int | str | None, kept: str, broken: str) -> None:
    one = Constraint(kind, value)
    assert one.holds(kept) and not one.holds(broken) and not one.holds(" \n") and not one.holds("")
    assert "{}" not in one.wording


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, *_ in CASES} == set(KINDS)


def test_words_and_sentences() -> None:
    assert words_of("It's 12 o'clock, well-known!") == ["It's", "12", "o'clock", "well", "known"]
    assert sentences_of("Hi there! So... no end") == ["Hi there!", "So..."]
    assert sentences_of("... Hi.\n- ?! 2 + 2?") == ["Hi.", "2 + 2?"]
    assert sentences_of("a" * 100_000) == []  # within the time of a test
    assert Constraint("words", 1).wording == "Use exactly 1 word."


def test_questions_are_pure_split_and_solvable() -> None:
    domain = InstructionFollowing()
    kinds, sizes, keys = Counter[str](), Counter[int](), dict[str, set[str]]()
    for split in ("train", "eval"):
        for number in range(300):
            one = domain.problem(1, number, split)
            assert isinstance(one, Instructions)
            assert split_of(one.key) == split
            assert one.reward(one.solution) == 1.0, one
            assert one.reward("") == 0.0
            kinds.update(constraint.kind for constraint in one.constraints)
            sizes[len(one.constraints)] += 1
            keys.setdefault(split, set()).add(one.key)
    assert domain.problem(1, 7) == domain.problem(1, 7) != domain.problem(2, 7)
    assert set(kinds) == set(KINDS) and set(sizes) == {1, 2, 3}
    assert not keys["train"] & keys["eval"] and len(keys["train"]) > 250


def test_partial_credit_and_reasons() -> None:
    both = (Constraint("words", 2), Constraint("lower"))
    whole = Instructions("key", "", both, "")
    assert whole.reward("One two") == 0.0 and whole.reward("one two") == 1.0
    assert whole.explain("One two").reason == "broken: Write everything in lower case."
    assert Instructions("key", "", both, "", partial=True).reward("One two") == 0.5
