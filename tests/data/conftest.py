"""A small tokenizer for the tests of the loader, which do not depend on its vocabulary."""

from pathlib import Path

import pytest

from dsv4.data.tasks import TASKS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.train import train_tokenizer, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a tokenizer of 500 ids from a few examples."""
    texts = [example.question for task in TASKS.values() for example in (task.sample(n) for n in range(20))]
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(iter([*texts, "end.\n\nNext;\n" * 50]), vocab_size=500), folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer_folder)
