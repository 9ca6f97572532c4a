"""Faults in the middle of a run on two ranks: each is an error in words on both, and the last checkpoint stays."""

from __future__ import annotations

import re

import pytest

from .fault_ranks import End
from .ranks import run_ranks

SAVED = r"; nothing was updated, the last saved state is .*checkpoints"
WORDS = {
    "gradient": rf"NonFiniteLossError: step 2, stage only: gradient norm nan.*{SAVED}",
    "loss": rf"NonFiniteLossError: step 2, stage only: next_token nan.*{SAVED}",
    "no target": "NoTargetsError: batches 4 to 5 of stage 0 hold no target",
    "no target while writing": "NoTargetsError: batches 8 to 9 of stage 0 hold no target",
    "shard": "ShardError: shards/shard-00017.arrow is damaged",
    "full disk": "DiskFullError: .*/checkpoints/step-4 cannot be written: no space left on the disk",
    "full disk at the end": "DiskFullError: .*/checkpoints/step-4 cannot be written: no space left on the disk",
    "damaged": "ValueError: .*/checkpoints/step-5 is damaged or of another model .*; remove it to go on from another",
}
WHOLE = {"damaged": [4, 5], "no target while writing": [2, 4]}  # checkpoints at the end; else [2]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[End]]:
    return run_ranks("fault_ranks", "run_faults", 2, tmp_path_factory.mktemp("faults"))[0]


@pytest.mark.parametrize("name", WORDS)
def test_a_fault_is_an_error_in_words_on_both_ranks(name: str, ends: dict[str, list[End]]) -> None:
    """After a full disk the run went on to its end, step 5. A checkpoint that was begun becomes whole if it can."""
    for words, whole in ends[name]:
        assert re.search(WORDS[name], words), words
        assert whole == WHOLE.get(name, [2])
