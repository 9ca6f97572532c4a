"""Replicas: several processes train like one with all their rows; their errors are raised in the main process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dsv4.training.gradient import Result, Work, pack_batch, sum_results
from dsv4.training.losses import LossWeights
from dsv4.training.replicas import ReplicaError, Replicas

from .tiny_training import CONFIG, Rows, draw_documents, make_model

WEIGHTS = LossWeights(mtp=0.3, balance=0.5, indexer=1.0)  # every part is large enough to show in the gradient


@dataclass
class ListSource:
    """Source that holds its batches; helpers get all of them."""

    batches: list[Rows]

    def batch(self, step: int, /) -> Rows:
        return self.batches[step]


@dataclass
class ActingSource:
    """Source that calls `act` in helpers only."""

    act: Callable[[], Any]
    main: int

    def batch(self, step: int, /) -> Rows:
        if os.getpid() != self.main:
            self.act()
        return Rows(draw_documents(step, 20))


def fail() -> None:
    raise LookupError("shard 17 of the data is missing")


def end_of_file() -> None:
    raise EOFError("the shard ends early")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


class Unreadable:
    """An object that pickles but raises when unpickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return fail, ()


def gradients(rows: list[Rows], count: int, micro_batches: int = 1) -> tuple[Result, dict[str, torch.Tensor]]:
    """The step's result and gradients with the rows in one batch each."""
    model, optimizer = make_model()
    with Replicas(model, optimizer, [ListSource(rows)], count=count, micro_batches=micro_batches) as replicas:
        result = sum_results(replicas.gradient(Work(0, 0, WEIGHTS, quantized=False)))
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result, found


def test_two_processes_equal_one_that_takes_both_micro_batches() -> None:
    source = ListSource([Rows(draw_documents(n, 131, 6, 45)) for n in range(8)])
    work = [Work(0, step, LossWeights(mtp=0.3 if step < 3 else 0.0), quantized=step == 2) for step in range(4)]

    model, optimizer = make_model()
    with Replicas(model, optimizer, [source], count=2) as replicas:
        together = []
        for item in work:
            together.append(sum_results(replicas.gradient(item)))
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            replicas.update(0.01, 0.5)
            optimizer.zero_grad()
    # In shared memory a block that no loss reaches has gradients of zero, not none.
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name.startswith("mtp."))

    alone, alone_optimizer = make_model()
    with Replicas(alone, alone_optimizer, [source], micro_batches=2) as single:
        for item, want in zip(work, together, strict=True):
            (result,) = single.gradient(item)
            assert result.losses == want.losses and result.tokens == want.tokens
            assert torch.equal(result.loads["layers.2.ffn"], want.loads["layers.2.ffn"])
            single.update(0.01, 0.5)
            alone_optimizer.zero_grad()
    for (name, left), right in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(left, right), name
    for left, right in zip(optimizer.momenta(), alone_optimizer.momenta(), strict=True):
        assert torch.equal(left, right)


def uneven_rows() -> list[Rows]:
    """Batches with 2 and many targets, one without any, one whose only target is no MTP target, one too short for CSA.

    Documents differ in length and number.
    """
    few = draw_documents(1, 150, 30)
    many = draw_documents(2, 131, 6, 45)
    none = draw_documents(3, 40)
    first = draw_documents(4, 9, 12, 5)
    short = draw_documents(5, 3, 2)
    return [
        Rows(few, [[0] * 148 + [1, 1], [0] * 30]),
        Rows(many),
        Rows(none, [[1] + [0] * 39]),
        Rows(first, [[0, 1] + [0] * 7, [0] * 12, [0] * 5]),
        Rows(short),
        Rows(draw_documents(6, 70)),
    ]


@pytest.mark.parametrize(("count", "micro_batches"), [(2, 3), (1, 6), (3, 2)])
def test_uneven_batches_have_the_gradient_of_one_batch_of_all_their_rows(count: int, micro_batches: int) -> None:
    rows = uneven_rows()
    whole = Rows([d for r in rows for d in r.documents], [m for r in rows for m in r.loss_masks])
    want, want_gradients = gradients([whole], 1)
    got, got_gradients = gradients(rows, count, micro_batches)
    for name in ("next_token", "accuracy", "mtp", "balance", "indexer", "targets"):
        assert getattr(got.losses, name) == pytest.approx(getattr(want.losses, name), rel=1e-6), name
    assert got.tokens == want.tokens
    assert {n: load.tolist() for n, load in got.loads.items()} == {n: load.tolist() for n, load in want.loads.items()}
    difference = torch.cat([(got_gradients[n] - g).flatten() for n, g in want_gradients.items()]).norm()
    length = torch.cat([g.flatten() for g in want_gradients.values()]).norm()
    assert float(difference / length) < 1e-6
    assert all(not got_gradients[n].any() for n in set(got_gradients) - set(want_gradients))


def test_a_replica_without_mtp_targets_still_counts_its_experts() -> None:
    rows = [Rows(draw_documents(1, 9), [[0, 1] + [0] * 7]), Rows(draw_documents(2, 30))]
    result, _ = gradients(rows, 2)
    rows = (9 - 1) + (30 - 1)  # that have a next token
    assert int(result.loads["mtp.0.ffn"].sum()) == rows * CONFIG.num_experts_per_tok


def test_a_step_without_any_target_is_refused() -> None:
    rows = [Rows(draw_documents(n, 9), [[1] + [0] * 8]) for n in range(2)]
    with pytest.raises(ValueError, match="batches 0 to 1 of stage 0 hold no target"):
        gradients(rows, 2)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (fail, r"replica 1 of 2 failed: LookupError: shard 17(.|\n)*in fail\n"),
        (end_of_file, r"replica 1 of 2 failed: EOFError: the shard ends early"),
        (kill, r"replica 1 of 2 was ended by SIGKILL; the kernel sends it when memory runs out"),
        (leave, r"replica 1 of 2 ended with exit code 3"),
    ],
)
def test_a_helper_that_ends_is_reported_with_its_cause(act: Callable[[], Any], words: str) -> None:
    model, optimizer = make_model()
    with (
        Replicas(model, optimizer, [ActingSource(act, os.getpid())], count=2) as replicas,
        pytest.raises(ReplicaError, match=words),
    ):
        replicas.gradient(Work(0, 0, WEIGHTS, quantized=False))


def test_a_helper_killed_between_steps_is_named() -> None:
    model, optimizer = make_model()
    source = ListSource([Rows(draw_documents(n, 20)) for n in range(2)])
    with Replicas(model, optimizer, [source], count=2) as replicas:
        replicas.gradient(Work(0, 0, WEIGHTS, quantized=False))
        (helper,) = replicas._helpers
        assert helper.process.pid is not None
        os.kill(helper.process.pid, signal.SIGKILL)
        helper.process.join()
        with pytest.raises(ReplicaError, match="replica 1 of 2 was ended by SIGKILL"):
            replicas.update(0.01, 1.0)
    assert not helper.process.is_alive()


def test_a_source_that_cannot_be_unpickled_is_named() -> None:
    model, optimizer = make_model()
    sources: list[Any] = [Unreadable()]
    with (
        Replicas(model, optimizer, sources, count=2) as replicas,
        pytest.raises(ReplicaError, match="LookupError: shard 17"),
    ):
        sources[0] = ListSource([Rows(draw_documents(1, 20))])  # of this process alone
        replicas.gradient(Work(0, 0, WEIGHTS, quantized=False))


def test_an_error_in_the_main_process_ends_the_helpers() -> None:
    model, optimizer = make_model()
    replicas = Replicas(model, optimizer, [ListSource([])], count=2)
    with pytest.raises(IndexError), replicas:
        (helper,) = replicas._helpers
        replicas.gradient(Work(0, 0, WEIGHTS, quantized=False))
    assert not helper.process.is_alive()


def test_too_little_shared_memory_is_refused_in_words(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("dsv4.training.replicas.SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("dsv4.training.replicas.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    model, optimizer = make_model()
    with pytest.raises(MemoryError, match="2 replicas share .* bytes, 1,000 are free"):
        Replicas(model, optimizer, [], count=2).__enter__()


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"documents of \[3, 2\] tokens has loss masks of \[2, 3\]"):
        pack_batch(Rows([[1, 2, 3], [4, 5]], [[1, 1], [1, 1, 1]]), torch.device("cpu"))


@pytest.mark.parametrize(("count", "micro_batches"), [(0, 1), (1, 0)])
def test_a_count_below_one_is_refused(count: int, micro_batches: int) -> None:
    model, optimizer = make_model()
    with pytest.raises(ValueError, match="is 0"):
        Replicas(model, optimizer, [], count=count, micro_batches=micro_batches)
