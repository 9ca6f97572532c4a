"""Fill-in-the-middle and split tokens change how a text is written, never the text."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4.data.augment import Augmenter, Rates, find_merged
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.special import BOS, EOS, FIM

TEXT = "An end.\n\nNext; é then some words and more words, to be cut.\n" * 4


def encode(tokenizer: Tokenizer, text: str = TEXT) -> np.ndarray:
    return np.array([tokenizer.special_id(BOS), *tokenizer.encode(text), tokenizer.special_id(EOS)], np.uint16)


def test_the_middle_moves_to_the_end_between_the_marks(tokenizer: Tokenizer) -> None:
    augmenter, ids = Augmenter(tokenizer, Rates(fill_in_middle=1.0)), encode(tokenizer)
    hole, begin, end = FIM
    seen: set[str] = set()
    for seed in range(20):
        changed = augmenter.apply(ids, seed, 10_000)
        text = tokenizer.decode(changed.tolist())
        assert text.startswith(BOS + begin) and text.endswith(EOS)
        prefix, _, rest = text.removeprefix(BOS + begin).removesuffix(EOS).partition(hole)
        suffix, _, middle = rest.partition(end)
        assert prefix + middle + suffix == TEXT
        assert np.array_equal(changed, augmenter.apply(ids, seed, 10_000)) and changed.dtype == ids.dtype
        seen.add(prefix)
    assert len(seen) > 15
    assert np.array_equal(augmenter.apply(ids, 1, len(ids)), ids)  # no room for the marks


def test_a_cut_character_is_left_alone(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "日本語")[2:-1]
    assert np.array_equal(Augmenter(tokenizer, Rates(fill_in_middle=1.0)).apply(ids, 1, 99), ids)


def test_merged_tokens_are_split_at_the_rate(tokenizer: Tokenizer) -> None:
    merged = find_merged(tokenizer)
    assert merged and all(tokenizer.token_bytes(token)[0:1] not in b"\n" for token in merged)
    for token, parts in merged.items():
        assert len(parts) >= 2 and tokenizer.decode(parts.tolist()) == tokenizer.decode([token])
    ids = encode(tokenizer, "end.\n\nNext;\n" * 200)
    hits = int(np.isin(ids, list(merged)).sum())
    assert hits > 100
    whole = Augmenter(tokenizer, Rates(split_merged=1.0)).apply(ids, 1, 10_000)
    assert not np.isin(whole, list(merged)).any()
    some = Augmenter(tokenizer, Rates(split_merged=0.3)).apply(ids, 1, 10_000)
    assert 0.15 * hits < int(np.isin(ids, list(merged)).sum() - np.isin(some, list(merged)).sum()) < 0.45 * hits
    for changed in (whole, some):
        assert tokenizer.decode(changed.tolist()) == tokenizer.decode(ids.tolist())
    assert len(Augmenter(tokenizer, Rates(split_merged=1.0)).apply(ids, 1, len(ids) + 3)) <= len(ids) + 3


def test_rates_are_shares() -> None:
    assert not Rates() and Rates(split_merged=0.1)
    with pytest.raises(ValueError, match="fill_in_middle is 1.5; allowed: 0 to 1"):
        Rates(fill_in_middle=1.5)
