"""A small tokenizer for the tests of the loader, which do not depend on its vocabulary."""

import pytest

from dsv4.data.tasks import TASKS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of 500 ids from a few examples."""
    texts = [example.question for task in TASKS.values() for example in (task.sample(n) for n in range(20))]
    return Tokenizer(train_tokenizer(iter(texts), vocab_size=500).to_str())
