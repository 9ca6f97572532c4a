"""Training FLOPs are sums of decode FLOPs over the tokens of documents."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4.analysis.flops import decode_flops
from dsv4.analysis.training_flops import Phase, training_flops
from dsv4.config import ModelConfig

NANO = ModelConfig.preset("nano")


def tokens(config: ModelConfig, length: int) -> int:
    return sum(decode_flops(config, context).raw for context in range(1, length + 1))


@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 129, 511, 515, 516, 517, 900])
def test_forward_and_backward_are_three_times_the_decoding_of_every_token(length: int) -> None:
    assert training_flops(NANO, (length,), mtp=False) == 3 * tokens(NANO, length)


def test_documents_add_up() -> None:
    assert training_flops(NANO, (5, 700)) == training_flops(NANO, (5,)) + training_flops(NANO, (700,))


def test_phases_leave_out_what_they_do_not_compute() -> None:
    """Dense has no indexer; the warm-up has no backward but the indexer's."""
    found: dict[Phase, int] = {phase: training_flops(NANO, (900,), phase, mtp=False) for phase in _PHASES}
    everything = tokens(replace(NANO, index_topk=1000), 900)
    indexer = everything - found["dense"] // 3
    assert indexer > 0 and found["dense"] % 3 == 0
    assert found["warmup"] == found["dense"] // 3 + 3 * indexer
    assert found["sparse"] < 3 * everything


_PHASES: tuple[Phase, ...] = ("dense", "warmup", "sparse")


def test_the_mtp_block_is_about_a_layer_and_a_head() -> None:
    flash = ModelConfig.preset("flash")
    plain, full = (training_flops(flash, (4096,), mtp=mtp) for mtp in (False, True))
    assert 1 / 43 < full / plain - 1 < 3 / 43
    assert plain == pytest.approx(6 * 13e9 * 4096, rel=0.35)  # 6 N T with 13B active parameters
