import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.tokenizer import Tokenizer, TokenizerMissingError
from dsv4.tokenizer.special import ASSISTANT, BOS, DSML, END_THINK, EOS, PAD, SPECIAL_TOKENS, THINK, USER
from dsv4.tokenizer.train import train_tokenizer


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("spelling", SPECIAL_TOKENS)
def test_a_special_spelling_in_text_stays_text(tokenizer: Tokenizer, folder: Path, spelling: str) -> None:
    text = f"say {spelling} now{spelling}"
    ids = tokenizer.encode(text)
    assert not special_ids(tokenizer) & set(ids)
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode(ids) == text
    # Control: the library's usual way does turn the text into the token.
    usual = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.special_id(spelling) in usual.encode(text).ids


def test_rendered_ranges_alone_become_special(tokenizer: Tokenizer) -> None:
    text = f"{USER}I type {USER} and {END_THINK}{ASSISTANT}"
    ranges = [(0, len(USER)), (len(text) - len(ASSISTANT), len(text))]
    ids = tokenizer.encode_rendered(text, ranges)
    assert [i for i in ids if i in special_ids(tokenizer)] == [
        tokenizer.special_id(USER),
        tokenizer.special_id(ASSISTANT),
    ]
    assert (ids[0], ids[-1]) == (tokenizer.special_id(USER), tokenizer.special_id(ASSISTANT))
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("ranges", [[(3, 3)], [(0, 99)], [(2, 4), (1, 2)]])
def test_bad_ranges_are_refused(tokenizer: Tokenizer, ranges: list[tuple[int, int]]) -> None:
    with pytest.raises((ValueError, KeyError)):
        tokenizer.encode_rendered("abcdef", ranges)


def test_bos_eos_pad_keep_the_official_ids(tokenizer: Tokenizer, folder: Path) -> None:
    assert [tokenizer.special_id(text) for text in (BOS, EOS, PAD)] == [0, 1, 2]
    assert tokenizer.eos_token_id == 1
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is False and config["add_eos_token"] is False
    added = {t["content"]: t["special"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    assert added[EOS] and not added[USER] and not added[THINK] and not added[DSML]


def test_the_vocabulary_has_exactly_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 401
    assert len({tokenizer.token_bytes(i) for i in range(401)}) == 401
    # A corpus too small for the size leaves placeholders, as in the official vocabulary.
    small = Tokenizer(train_tokenizer(iter(["ab"]), vocab_size=300).to_str())
    assert small.vocab_size == 300
    assert small.special_id("<｜place▁holder▁no▁0｜>") >= 256
    with pytest.raises(ValueError, match="at least"):
        train_tokenizer(iter(["ab"]), vocab_size=200)


def test_each_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a2024b")] == ["a", "2", "0", "2", "4", "b"]


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not special_ids(tokenizer) & set(ids)


@settings(deadline=None)
@given(st.text())
def test_streamed_text_is_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.decode_stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert stream.flush() == ""
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None)
@given(st.lists(st.integers(0, 400)))
def test_streaming_any_ids_equals_decoding_them(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.decode_stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_a_cut_character_is_held_back_and_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    first, second = byte[b"\xf0"], byte[b"\x9f"]
    stream = tokenizer.decode_stream()
    assert stream.push(first) == "" and stream.push(second) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, 401])
def test_an_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token_id}: ids 0 to 400"):
        tokenizer.decode([token_id])


def test_a_folder_without_a_tokenizer_says_that_ids_still_work(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissingError, match="token ids still work"):
        Tokenizer.from_pretrained(tmp_path)
    assert issubclass(TokenizerMissingError, FileNotFoundError)


@pytest.mark.parametrize("content", ["x", "[]", '{"added_tokens": []}', '{"a": 1}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a byte-level BPE tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800c", "character 2 is U+D800, half of a surrogate pair; allowed: whole Unicode characters"),
        ("\udc00", "character 0 is U+DC00, half of a surrogate pair"),
        (b"caf\xe9".decode(errors="surrogateescape"), "character 3 is byte 0xE9, which is not UTF-8"),
        ("\ud83d\ude42", "character 0 is U+D83D"),  # two escaped halves are not joined to a character
    ],
)
def test_text_without_a_utf_8_encoding_is_refused(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"the text: {message}")):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match=re.escape(f"text 1: {message}")):
        tokenizer.encode_batch(["good", text])
    with pytest.raises(ValueError, match=re.escape(f"the prompt: {message}")):
        tokenizer.encode_rendered(text, [])


def test_truncation_and_padding_of_a_saved_call_are_not_applied(tokenizer: Tokenizer, folder: Path) -> None:
    """transformers leaves the settings of its last call in the file that it saves."""
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding()
    loaded = Tokenizer(saved.to_str())
    texts = ["a", "Hello world, this is a text of more than four tokens."]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert loaded.encode(texts[1]) == tokenizer.encode(texts[1]) and len(loaded.encode(texts[1])) > 4
    rendered = f"a{USER}{texts[1]}"
    assert loaded.encode_rendered(rendered, [(1, 1 + len(USER))]) == tokenizer.encode_rendered(
        rendered, [(1, 1 + len(USER))]
    )
