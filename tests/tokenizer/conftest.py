"""Fixtures: a small tokenizer with V4's special tokens, trained in a moment."""

from pathlib import Path

import pytest

from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer

TEXTS = [
    "The cat's owner may look up words in the library, and every word that she finds is read aloud.",
    "Sort these numbers in ascending order: 12, 7, 2024. Hello! How can I help you?",
    "Grüße, 世界! Καλημέρα κόσμε 🙂🙂 naïve café",
    '{"name": "Anna", "age": 34}',
] * 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small tokenizer's files."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(iter(TEXTS), vocab_size=401), path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    """The small tokenizer."""
    return Tokenizer.from_pretrained(folder)
