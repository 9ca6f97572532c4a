"""The published tokenizer: known figures, plain text, special tokens, prompts."""

import json
from pathlib import Path

import deepseek_recipe as recipe
import pytest
import tokenizers
from deepseek_recipe import AssistantMessage, Conversation, SystemMessage, UserMessage

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import ASSISTANT, BOS, DSML, END_THINK, EOS, FIM, LATEST_REMINDER, PAD, THINK, USER

from ..published_tokenizer import corpus, published_folder, special_spellings

FILE = published_folder() / "tokenizer.json"
IDS = {
    BOS: 0,
    EOS: 1,
    PAD: 2,
    USER: 128803,
    ASSISTANT: 128804,
    THINK: 128821,
    END_THINK: 128822,
    DSML: 128825,
    **dict(zip(FIM, (128800, 128801, 128802), strict=True)),
    LATEST_REMINDER: 128828,
    "<|EOT|>": 128805,
    "<｜title｜>": 128836,
    "<｜read_url｜>": 128845,
    "<｜place▁holder▁no▁0｜>": 128000,
    "<｜/table>｜": 129265,
}


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return Tokenizer.from_pretrained(published_folder())


@pytest.fixture(scope="module")
def usual() -> tokenizers.Tokenizer:
    """The same file in its own library, which turns special spellings in text into tokens."""
    return tokenizers.Tokenizer.from_file(str(FILE))


def test_the_file_is_the_published_one(published: Tokenizer) -> None:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    assert FILE.stat().st_size == 6_367_146
    assert (len(content["model"]["vocab"]), len(content["model"]["merges"])) == (128_000, 127_741)
    assert len(content["added_tokens"]) == 1_283
    assert published.vocab_size == 129_280 and published.eos_token_id == 1
    assert {spelling: published.special_id(spelling) for spelling in IDS} == IDS


@pytest.mark.parametrize("name", corpus())
def test_text_round_trips_and_ids_equal_the_library_s(
    name: str, published: Tokenizer, usual: tokenizers.Tokenizer
) -> None:
    text = corpus()[name]
    ids = published.encode(text)
    assert published.decode(ids) == text
    assert published.encode_batch([text]) == [ids]
    assert not set(ids) & set(published.special_tokens.values())
    stream = published.decode_stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    if not any(spelling in text for spelling in special_spellings()):
        assert ids == usual.encode(text, add_special_tokens=False).ids


def test_prompts_are_those_of_the_recipe(published: Tokenizer) -> None:
    encoding = recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(FILE)))
    typed = f"I write {USER}, {END_THINK} and ｜DSML｜ 42 日本\r\n"
    conversation = Conversation(
        [SystemMessage(typed), UserMessage(typed), AssistantMessage(typed, typed), UserMessage("y")],
        reasoning_effort="low",
    )
    ids = PromptEncoder(published).encode(conversation)
    assert ids == encoding.encode(conversation)
    assert ids[0] == 0 and ids[-2:] == [128804, 128821] and ids.count(128803) == 2


def test_the_package_is_not_needed_to_run(tmp_path: Path) -> None:
    """Only tests need the package: a folder with the tokenizer file is enough."""
    (tmp_path / "tokenizer.json").symlink_to(FILE)
    assert Tokenizer.from_pretrained(tmp_path).encode("Hello, world!") == [19923, 14, 2058, 3]
