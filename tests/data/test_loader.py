import pytest

from dsv4.data.loader import GROUP, MIXTURES, STDLIB, NanoLoader
from dsv4.data.sources import LEAST_CHARACTERS, MOST_CHARACTERS, stdlib_documents
from dsv4.data.tasks import TASKS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS, USER

TOKENS = 1999


def loader(tokenizer: Tokenizer, stage: str = "sft", seed: int = 1, **kwargs: object) -> NanoLoader:
    return NanoLoader(tokenizer, stage, seed, TOKENS, **kwargs)  # pyright: ignore[reportArgumentType]


def test_a_fresh_loader_continues_to_the_same_bits(tokenizer: Tokenizer) -> None:
    whole = loader(tokenizer)
    steps = [whole.batch(step) for step in range(GROUP + 3)]
    resumed = loader(tokenizer)
    assert [resumed.batch(step) for step in range(GROUP - 1, GROUP + 3)] == steps[GROUP - 1 :]
    assert whole.batch(2) == steps[2]
    other = loader(tokenizer, seed=2)
    assert other.batch(0) != steps[0]
    assert loader(tokenizer, "pretrain").batch(0) != steps[0]


def test_batches_are_full_but_never_over(tokenizer: Tokenizer) -> None:
    source = loader(tokenizer)
    batches = [source.batch(step) for step in range(GROUP)]
    assert all(batch.tokens == sum(map(len, batch.documents)) <= TOKENS for batch in batches)
    assert sum(batch.tokens for batch in batches) > 0.97 * GROUP * TOKENS
    for batch in batches:
        assert [len(ids) for ids in batch.documents] == [len(mask) for mask in batch.loss_masks]


def test_documents_start_with_bos_and_learn_only_what_the_assistant_writes(tokenizer: Tokenizer) -> None:
    bos, eos, user = (tokenizer.special_id(text) for text in (BOS, EOS, USER))
    batch = loader(tokenizer).batch(0)
    for ids, mask in zip(batch.documents, batch.loss_masks, strict=True):
        if ids[0] != bos:  # the tail of a document longer than a row
            continue
        assert mask[0] == 0 and not any(m for i, m in zip(ids, mask, strict=True) if i == user)
        assert ids[-1] != eos or mask[-1] == 1


def test_pretraining_learns_every_token_of_prose_too(tokenizer: Tokenizer) -> None:
    batch = loader(tokenizer, "pretrain", mixture={STDLIB: 1.0}).batch(0)
    assert all(all(mask) for mask in batch.loss_masks)
    text = tokenizer.decode(batch.documents[0])
    assert text.startswith(BOS) and text.endswith(EOS)
    assert text.removeprefix(BOS).removesuffix(EOS) in stdlib_documents()


def test_shares_are_of_tokens(tokenizer: Tokenizer) -> None:
    source = loader(tokenizer, mixture={"tool_call": 1.0, "conversation": 1.0})
    tools = tokens = 0
    for step in range(2 * GROUP):
        batch = source.batch(step)
        tokens += batch.tokens
        tools += sum(len(ids) for ids in batch.documents if "Available Tool Schemas" in tokenizer.decode(ids))
    assert 0.3 < tools / tokens < 0.7


def test_unknown_stages_and_sources_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="stage 'rl': one of pretrain, sft"):
        loader(tokenizer, "rl")
    with pytest.raises(ValueError, match=r"unknown sources \['chess'\]"):
        loader(tokenizer, mixture={"chess": 1.0})
    assert all(set(mixture) <= {*TASKS, STDLIB} for mixture in MIXTURES.values())


def test_library_documents_are_prose_sized_and_ordered() -> None:
    documents = stdlib_documents()
    assert len(documents) > 500 and len(set(documents)) == len(documents)
    assert all(LEAST_CHARACTERS <= len(text) <= MOST_CHARACTERS for text in documents)
