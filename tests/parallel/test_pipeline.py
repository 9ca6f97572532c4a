"""Stages on several ranks train as one process, alone and with context and data parallelism."""

from __future__ import annotations

import pytest
import torch

from dsv4.model.transformer import Transformer
from dsv4.parallel.pipeline import keep_stage, place_of
from tests.model.tiny import tiny_config

from .ranks import run_ranks

MANY = [[5, 40], [130], [3, 3, 9], [12, 2, 131]]  # documents of the micro-batches
PHASES = ["sparse", "sparse", "sparse"]


def check(ranks: int, *arguments: object, kernels: str = "native") -> None:
    for losses, norms, parameters in run_ranks("pipeline_ranks", "train", ranks, *arguments, DSV4_KERNELS=kernels):
        assert losses < 1e-6
        assert norms < 1e-6
        assert parameters < 1e-3  # AdamW makes a whole step of a gradient that is nothing but rounding


def test_two_stages_train_as_one_process() -> None:
    check(2, (2, 1, 1), [3, 1], MANY[:3], PHASES[:2])


@pytest.mark.slow
def test_stages_of_all_phases_and_fewer_micro_batches_than_stages() -> None:
    check(2, (2, 1, 1), [1, 3], MANY[:1], ["dense", "warmup", "sparse"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "sizes", "mtp"),
    [((4, 1, 1), [1, 1, 1, 1], 1), ((4, 1, 1), [1, 1, 1, 1], 0), ((2, 1, 2), [2, 2], 1), ((2, 2, 1), [1, 3], 1)],
)
def test_four_ranks(shape: tuple[int, int, int], sizes: list[int], mtp: int) -> None:
    check(4, shape, sizes, MANY, PHASES, mtp)


@pytest.mark.slow
def test_stages_on_the_reference() -> None:
    check(2, (2, 1, 1), [2, 2], MANY, PHASES, kernels="reference")


def test_stages_have_the_parameters_of_the_model_once() -> None:
    config = tiny_config(schedule=(0, 4, 128, 4), num_nextn_predict_layers=1)
    whole = {name for name, _ in Transformer(config).named_parameters()}
    seen: list[str] = []
    for index in range(3):
        model = Transformer(config)
        keep_stage(model, place_of([1, 2, 1], index, 4))
        assert model.device == torch.device("cpu") and model.dtype == torch.float32
        seen += [name for name, _ in model.named_parameters()]
    assert set(seen) == whole
    assert sorted(seen) == sorted([*whole, "embed.weight"])  # the MTP block needs it too


def test_stages_must_hold_all_layers() -> None:
    with pytest.raises(ValueError, match=r"stages of \[2, 3\] layers.*the model's 4"):
        place_of([2, 3], 0, 4)
