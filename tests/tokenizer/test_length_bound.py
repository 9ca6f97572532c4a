"""Lower bound on a text's tokens: never above the count, and close enough to be useful."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.config import nano_path
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.length_bound import LengthBound, keeps_every_byte
from dsv4.tokenizer.special import ASSISTANT, USER

NANO = Tokenizer.from_pretrained(nano_path())
REMOVING = {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}
WORDS = ["comprehensively", " the", "\n", "    ", "12", "é", "世界", "🙂", USER, "function(", "\t\t"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=60).map("".join)), st.integers(1, 40))
@settings(deadline=None, max_examples=300)
def test_no_text_has_fewer_tokens_than_its_bound(text: str, times: int) -> None:
    assert NANO.min_tokens(text * times) <= len(NANO.encode(text * times))


def test_the_bound_of_plain_text_is_not_far_below_its_tokens() -> None:
    text = "What is 12 + 30? The sum of both numbers is 42.\n" * 50
    assert NANO.min_tokens(text) > len(text) / 25  # 1,200 tokens, none longer than 21 bytes


def test_a_text_of_the_longest_tokens_reaches_the_bound() -> None:
    bound = LengthBound([b"a", b"aaaa", b"b", b"bb"])
    assert [bound.tokens("a" * n) for n in (0, 1, 4, 5, 4000)] == [0, 1, 1, 2, 1000]
    assert bound.tokens("aaaabb") == 2
    assert bound.tokens("ccc") == 0  # no token holds "c", so that it may be dropped


def test_a_byte_that_is_no_token_itself_counts_nothing() -> None:
    """BPE begins with single bytes: an unknown byte is dropped, though a longer token holds it."""
    assert LengthBound([b"q", b"qu"]).tokens("uuuu") == 0


def test_a_rendered_prompt_counts_its_special_tokens() -> None:
    prompt = f"{USER}hello{ASSISTANT}"
    ranges = [(0, len(USER)), (len(prompt) - len(ASSISTANT), len(prompt))]
    assert 3 <= NANO.min_tokens_rendered(prompt, ranges) <= NANO.count_rendered(prompt, ranges)
    assert NANO.count_rendered(prompt, ranges) == len(NANO.encode_rendered(prompt, ranges))


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": []}}, True),
        ({"normalizer": {"type": "NFC"}}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        ({"pre_tokenizer": REMOVING}, False),
    ],
)
def test_a_tokenizer_that_drops_text_has_no_bound(change: dict[str, object], kept: bool) -> None:
    definition = json.loads((Path(nano_path()) / "tokenizer.json").read_text(encoding="utf-8")) | change
    assert keeps_every_byte(definition) == kept
    assert (Tokenizer(json.dumps(definition)).min_tokens("word " * 100) > 0) == kept
