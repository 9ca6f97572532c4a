"""Faults in the middle of a run on two ranks: each is an error in words on both, and the last checkpoint stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .fault_ranks import FAULTS
from .ranks import run_ranks

WORDS = {
    "gradient": r"NonFiniteLossError: step 2, stage only: gradient norm nan.*nothing was updated, the last saved state is",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, list[int]]]]:
    return run_ranks("fault_ranks", "run_faults", 2, tmp_path_factory.mktemp("faults"))[0]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error_in_words_on_both_ranks(name: str, ends: dict[str, list[tuple[str, list[int]]]]) -> None:
    for words, whole in ends[name]:
        assert re.search(WORDS[name], words), words
        assert whole == [2]
