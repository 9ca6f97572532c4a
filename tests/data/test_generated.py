from random import Random

import pytest

from dsv4.data.generated import TASK_SHARES, TaskDocuments
from dsv4.data.tasks import TASKS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS, USER


def documents(tokenizer: Tokenizer, count: int = 60, whole_loss: bool = False, shares: dict | None = None) -> list:
    source, random = TaskDocuments(tokenizer, shares or TASK_SHARES, whole_loss), Random(5)
    return [source.draw(random) for _ in range(count)]


def test_documents_are_a_function_of_the_draws(tokenizer: Tokenizer) -> None:
    assert documents(tokenizer, 9) == documents(tokenizer, 9)


def test_documents_start_with_bos_and_learn_only_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    bos, eos, user = (tokenizer.special_id(text) for text in (BOS, EOS, USER))
    for document in documents(tokenizer):
        assert document.ids[0] == bos and document.mask[0] == 0
        assert not any(m for i, m in zip(document.ids, document.mask, strict=True) if i == user)
        assert document.ids[-1] == eos and document.mask[-1] == 1


def test_with_whole_loss_every_token_is_learned(tokenizer: Tokenizer) -> None:
    assert all(all(document.mask) for document in documents(tokenizer, whole_loss=True))


def test_shares_are_of_tokens(tokenizer: Tokenizer) -> None:
    tools = tokens = 0
    for document in documents(tokenizer, 400, shares={"tool_call": 1.0, "conversation": 1.0}):
        tokens += len(document)
        tools += len(document) if "Available Tool Schemas" in tokenizer.decode(list(document.ids)) else 0
    assert 0.3 < tools / tokens < 0.7


def test_every_task_has_a_share_and_others_are_refused(tokenizer: Tokenizer) -> None:
    assert set(TASK_SHARES) == set(TASKS)
    with pytest.raises(ValueError, match=r"unknown tasks \['chess'\]"):
        TaskDocuments(tokenizer, {"chess": 1.0}, whole_loss=False)
