"""The rollout service: killed requests have the tokens of whole ones; fencing, failures, new weights, processes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import sqlalchemy as sql

from dsv4.config import nano_path
from dsv4.engine import LLM, SamplingParams
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import Block
from dsv4.model.choices import ChoiceNotes, Choices
from dsv4.model.transformer import Transformer
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rollout_service.process import WorkerPlan, work
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.records import Finished, LoggedToken, NewRequest, Step
from dsv4.post_training.rollout_service.tables import REQUESTS, database
from dsv4.post_training.rollout_service.weights import PublishedWeights
from dsv4.post_training.rollout_service.worker import RolloutWorker
from dsv4.training.export import export_model
from dsv4.usage.store import open_store

from ..forked import FORKED
from .small_policy import small_policy

LENGTHS = (5, 33, 130)
TOKENS = 40
LEASE = 2.0


def small_llm(max_num_seqs: int = 4, **options: Any) -> LLM:
    model = small_policy()[0].model
    return LLM(model, folder=nano_path(), max_num_seqs=max_num_seqs, max_model_len=512, **options)


def requests(count: int = 6, tokens: int = TOKENS) -> list[NewRequest]:
    made = (list(range(3 + n, 3 + n + LENGTHS[n % 3])) for n in range(count))
    return [
        NewRequest(n, tuple(prompt), {"max_tokens": tokens, "seed": n, "ignore_eos": True})
        for n, prompt in enumerate(made)
    ]


def whole(llm: LLM, asked: Sequence[NewRequest]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of requests that nobody interrupts."""
    params = [SamplingParams(**request.params, logprobs=True) for request in asked]
    outputs = llm.generate([list(request.prompt_token_ids) for request in asked], params)
    return [(output.token_ids, output.logprobs) for output in outputs]


def drawn(finished: Sequence[Finished]) -> list[tuple[list[int], list[float]]]:
    return [([t.token_id for t in one.tokens], [t.log_probability for t in one.tokens]) for one in finished]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_killed_200_times_have_the_tokens_of_whole_ones(tmp_path: Path) -> None:
    """Every worker is dropped in the middle of all requests, after two tokens; the next goes on."""
    asked, clock = requests(2, tokens=230), Clock()
    llm = small_llm()
    want = whole(llm, asked)
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}", max_stalled=1000, lease_seconds=30.0, clock=clock)
    queue.add(1, asked)
    kills = 0
    while queue.unfinished(1):
        worker = RolloutWorker(f"w{kills}", queue, llm)
        before = queue.num_tokens()
        while queue.num_tokens() < before + 2 and worker.step():
            pass
        llm.core.abort_all()  # the process is gone, and with it what the engine held
        llm.core.reset_prefix_cache()
        clock.now += 31.0
        kills += 1
    assert kills >= 200
    assert drawn(queue.finished(1)) == want
    assert {one.finish_reason for one in queue.finished(1)} == {"length"}


def test_starting_again_from_scratch_favors_short_answers(tmp_path: Path) -> None:
    """A worker that may die behind every token: with the log lengths are those of nobody's death, without it shorter.

    An end and a death have probability 0.1 each: the expected length is 10, and 5.3 of what starts again. A seed that
    stays would give the same answer again; a restart draws another.
    """
    llm, rng = small_llm(max_num_seqs=16), random.Random(1)
    ends = tuple(range(4, llm.config.vocab_size, 10))

    def asked(number: int, seed: int) -> NewRequest:
        return NewRequest(number, (3, 4, 5 + number), {"max_tokens": 100, "seed": seed, "stop_token_ids": ends})

    def lengths(keeps_log: bool, hazard: float) -> list[int]:
        clock, count, restarts = Clock(), 96, 0
        queue = RolloutQueue(
            f"sqlite:///{tmp_path / f'{keeps_log}-{hazard}.db'}", max_stalled=1000, lease_seconds=30.0, clock=clock
        )
        for number in range(count):
            queue.add(number, [asked(number, number)])
        worker = RolloutWorker("w0", queue, llm)
        while worker.step():
            if rng.random() >= hazard:
                continue
            llm.core.abort_all()
            llm.core.reset_prefix_cache()
            clock.now += 31.0
            if not keeps_log:
                for number in queue.open_batches():
                    restarts += 1
                    queue.remove(number)
                    queue.add(number, [asked(number, count + restarts)])
            worker = RolloutWorker(f"w{clock.now}", queue, llm)
        return [len(one.tokens) for number in range(count) for one in queue.finished(number)]

    whole = lengths(True, 0.0)
    assert len(whole) == 96 and 8.0 < sum(whole) / 96 < 12.0
    assert lengths(True, 0.1) == whole
    assert 4.0 < sum(lengths(False, 0.1)) / 96 < 7.0


def test_a_worker_that_lost_its_lease_writes_nothing(tmp_path: Path) -> None:
    clock = Clock()
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}", lease_seconds=30.0, clock=clock)
    queue.add(1, requests(1))
    (old,) = queue.lease("old", 4)
    assert queue.write([Step(old, 0, [LoggedToken(5, -1.0, 0)])]) == set()
    clock.now = 29.0
    assert queue.lease("new", 4) == []
    clock.now = 60.0
    (new,) = queue.lease("new", 4)
    assert new.tokens == (LoggedToken(5, -1.0, 0),) and new.attempt == 2
    assert queue.silent_workers() == {"old"}  # it may hang, and holds nothing that would show it
    assert queue.write([Step(old, 1, [LoggedToken(9, -2.0, 0)], "stop")]) == {old.id}
    assert queue.write([Step(new, 1, [LoggedToken(6, -1.5, 0)], "stop")]) == set()
    (one,) = queue.finished(1)
    assert [token.token_id for token in one.tokens] == [5, 6]


def test_a_lease_of_a_request_that_is_gone_is_none_of_a_later_request(tmp_path: Path) -> None:
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}")
    queue.add(1, requests(1))
    (old,) = queue.lease("old", 4)
    queue.remove(1)
    queue.add(2, requests(1))
    (new,) = queue.lease("new", 4)
    assert queue.write([Step(old, 0, [LoggedToken(9, -2.0, 0)], "stop")]) == {old.id}
    assert queue.finished(2) == [] and queue.write([Step(new, 0)]) == set()


def test_a_worker_takes_its_own_requests_back_after_a_silence(tmp_path: Path) -> None:
    clock, asked, llm = Clock(), requests(2), small_llm()
    want = whole(llm, asked)
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}", lease_seconds=30.0, clock=clock)
    queue.add(1, asked)
    worker = RolloutWorker("w", queue, llm)
    for _ in range(5):
        worker.step()
    clock.now += 31.0  # it has loaded weights, say
    worker.step()
    assert len(llm.core.scheduler.running) + len(llm.core.scheduler.waiting) == 2  # none is computed twice
    assert queue.silent_workers() == set()
    worker.run(lambda: not queue.unfinished(1))
    assert drawn(queue.finished(1)) == want


def test_a_request_that_ends_its_workers_fails_in_words(tmp_path: Path) -> None:
    clock = Clock()
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}", max_stalled=3, lease_seconds=30.0, clock=clock)
    queue.add(1, requests(1))
    for n in range(4):
        queue.lease(f"w{n}", 4)
        clock.now += 31.0
    (one,) = queue.finished(1)
    assert one.error == "3 workers ended on it without a further token, the last was w2"


def test_a_request_that_cannot_run_fails_in_words_and_the_rest_goes_on(tmp_path: Path) -> None:
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}")
    good, *_ = requests()
    queue.add(7, [NewRequest(0, (), {"seed": 1}), good, NewRequest(2, (3,), {"seed": 1, "top_q": 1})])
    worker = RolloutWorker("w", queue, small_llm())
    worker.run(lambda: not queue.unfinished(7))
    first, second, third = queue.finished(7)
    assert first.error is not None and "the prompt is empty" in first.error
    assert third.error is not None and "top_q" in third.error
    assert second.error is None and len(second.tokens) == TOKENS
    with pytest.raises(ValueError, match="batch 7 is in the queue already"):
        queue.add(7, [good])
    queue.remove(7)
    assert queue.finished(7) == [] and queue.unfinished(7) == 0
    with pytest.raises(ValueError, match="needs a seed"):
        NewRequest(0, (1,), {})


def test_new_weights_in_the_middle_keep_the_tokens_and_mark_the_versions(tmp_path: Path) -> None:
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}")
    asked = requests(3)
    queue.add(1, asked)
    record: dict[str, Any] = {"enable_return_routed_experts": True, "enable_return_indexer_topk": True}
    llm = small_llm(**record)
    want = whole(llm, asked)
    worker = RolloutWorker("w", queue, llm, version=1)
    for _ in range(12):
        worker.step()
    other = small_policy()[0].model
    other.head.weight.data.mul_(3.0)
    for block in other.layers:
        cast(Block, block).ffn.gate.weight.data.neg_()
        cast(Block, block).attn.wkv.weight.data.neg_()
    later = LLM(other, folder=nano_path(), max_num_seqs=4, max_model_len=512, **record)
    worker.use(later, version=2)
    worker.run(lambda: not queue.unfinished(1))
    for one, (tokens, _) in zip(queue.finished(1), want, strict=True):
        versions = [token.version for token in one.tokens]
        assert versions == sorted(versions) and set(versions) == {1, 2} and len(versions) == TOKENS
        first = versions.count(1)
        assert [token.token_id for token in one.tokens[:first]] == tokens[:first]
        kept = Choices.joined([token.choices for token in one.tokens if token.choices is not None])
        document = [*one.prompt_token_ids, *(token.token_id for token in one.tokens)][:-1]
        place = len(one.prompt_token_ids) + first - 1  # of the first token that the new weights drew from
        for part, drawer in ((slice(0, place), llm), (slice(place, None), later)):  # each from whom it was drawn by
            notes = ChoiceNotes.of(other.config, len(document), other.device)
            model = cast(Transformer, drawer.core.runner.model)
            model.next_token_logits(RaggedBatch.pack([document]), notes=notes)
            mine, its = kept[part], notes.choices()[part]
            assert np.array_equal(mine.experts, its.experts)  # pyright: ignore[reportArgumentType]
            assert np.array_equal(mine.entries, its.entries)  # pyright: ignore[reportArgumentType]


def test_a_worker_that_takes_long_over_new_weights_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its leases are renewed meanwhile, but not without end: its time stands still until both have been seen."""
    model, url = small_policy()[0].model, f"sqlite:///{tmp_path / 'q.db'}"
    export_model(model, tokenizer_files(nano_path(), tmp_path), tmp_path / "model")
    weights, queue = PublishedWeights(tmp_path / "weights"), RolloutQueue(url, LEASE, run="r")
    queue.add(1, requests(2))
    plan = WorkerPlan(
        name="w", run="r", url=url, weights=str(weights.folder), model=str(tmp_path / "model"), numerics="float",
        quantized=True, device="cpu", max_num_seqs=4, max_model_len=512, lease_seconds=LEASE, max_stalled=5, workers=1,
        silence_seconds=3 * LEASE,
    )  # fmt: skip
    plain, silent = PublishedWeights.load, list[set[str]]()

    def seen(wanted: set[str]) -> set[str]:
        """The silent workers, once they are as wanted: a thread that renews may be late now and then."""
        deadline = time.monotonic() + 60.0
        while (found := queue.silent_workers()) != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def slow(published: PublishedWeights, version: int, into: Transformer) -> bool:
        if version == 2:
            time.sleep(2 * LEASE)  # by now the leases of before have ended
            silent.append(seen(set()))
            clock.now += plan.silence_seconds + 1.0
            silent.append(seen({"w"}))
        return plain(published, version, into)

    def until() -> bool:
        if weights.latest() == 1 and queue.num_tokens() > 4:
            weights.publish(2, model)
        return bool(silent) and not queue.unfinished(1)

    clock = Clock()
    clock.now = time.monotonic()
    workers_time = SimpleNamespace(monotonic=clock, sleep=time.sleep)
    monkeypatch.setattr("dsv4.post_training.rollout_service.worker.time", workers_time)
    monkeypatch.setattr(PublishedWeights, "load", slow)
    weights.publish(1, model)
    work(plan, until)
    assert silent == [set(), {"w"}]
    assert {token.version for one in queue.finished(1) for token in one.tokens} == {1, 2}


def test_tokens_of_weights_that_a_run_has_lost_are_drawn_again(tmp_path: Path) -> None:
    """A run is taken back to version 3: its next version 4 is not the one that drew the token of that number."""
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}")
    queue.add(1, requests(5), version=3)
    queue.add(2, requests(1), version=4)
    leases = queue.lease("w", 5, version=4)
    old, lost = [LoggedToken(5, -1.0, 3), LoggedToken(6, -1.0, 3)], LoggedToken(7, -1.0, 4)
    late = LoggedToken(8, -1.0, 3)  # of a worker that was slow to take the new weights: behind a token of these
    logged = [(old, "stop"), ([*old, lost], "stop"), ([*old, lost, late], "stop"), ([*old, lost], None), ([lost], None)]
    queue.write([Step(lease, 0, tokens, end) for lease, (tokens, end) in zip(leases, logged, strict=True)])
    other = RolloutQueue(f"sqlite:///{tmp_path / 'q.db'}", run="other")
    other.add(1, requests(1))
    other.write([Step(other.lease("o", 1)[0], 0, [lost], "stop")])

    queue.take_back(3)
    assert not queue.known(2) and queue.unfinished(1) == 4 and [one.prompt for one in queue.finished(1)] == [0]
    assert queue.write([Step(lease, 3, [lost]) for lease in leases[1:]]) == {lease.id for lease in leases[1:]}
    again = queue.lease("v", 5, version=3)
    assert [list(lease.tokens) for lease in again] == [old, old, old, []]
    queue.write([Step(lease, len(lease.tokens), [LoggedToken(9, -1.0, 4)], "stop") for lease in again])
    assert [one.finish_reason for one in queue.finished(1)] == ["stop"] * 5
    assert other.finished(1)[0].tokens == (lost,)


def _work(url: str) -> None:
    """Work until SIGKILL comes; if it is late, wait for it behind 90 tokens: not all of them are one process's."""
    queue = RolloutQueue(url, lease_seconds=1.0)
    before = queue.num_tokens()

    def until() -> bool:
        while queue.num_tokens() >= before + 90:
            time.sleep(1.0)
        return False

    RolloutWorker(f"process {os.getpid()}", queue, small_llm()).run(until)


def test_real_processes_may_be_killed(tmp_path: Path) -> None:
    asked = requests(6)
    url = f"sqlite:///{tmp_path / 'q.db'}"
    queue = RolloutQueue(url, lease_seconds=1.0)
    queue.add(1, asked)
    killed = 0
    while queue.unfinished(1):
        process = FORKED.Process(target=_work, args=(url,))
        process.start()
        logged = queue.num_tokens()
        while process.is_alive() and queue.num_tokens() < logged + 60 and queue.unfinished(1):
            time.sleep(0.02)
        assert process.pid is not None and process.is_alive(), "a worker ends by being killed alone"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
    assert drawn(queue.finished(1)) == whole(small_llm(), asked)
    assert killed >= 2


def test_workers_that_contend_for_requests_get_each_once(queue_url: str, tmp_path: Path) -> None:
    queues = [RolloutQueue(queue_url, run=str(tmp_path)) for _ in range(4)]
    queues[0].add(1, requests(40))

    def take(place: int) -> list[int]:
        found: list[int] = []
        while leases := queues[place].lease(f"w{place}", 3):
            found += [lease.id for lease in leases]
        return found

    with ThreadPoolExecutor(4) as pool:
        taken = [number for found in pool.map(take, range(4)) for number in found]
    taken += [lease.id for lease in queues[0].lease("rest", 40)]  # one who found all locked has ended
    assert len(taken) == len(set(taken)) == 40
    for queue in queues:
        queue.close()


@pytest.mark.slow
def test_a_thread_waits_for_its_turn_on_a_slow_disk(tmp_path: Path) -> None:
    """A learner that samples ahead has hundreds of threads, and 15 connections to share."""
    queue = RolloutQueue(f"sqlite:///{tmp_path / 'queue.db'}")
    with ThreadPoolExecutor(1) as pool, ExitStack() as taken:
        for _ in range(15):
            taken.enter_context(queue._begin(reads=True))
        waiting = pool.submit(queue.known, 1)
        time.sleep(31)
        assert not waiting.done()
        taken.close()
        assert waiting.result() is False
    queue.close()


@pytest.mark.postgres
def test_workers_that_start_at_once_make_the_tables_once(postgres_server: str) -> None:
    """Without a lock, PostgreSQL refuses a table that another transaction is making, also IF NOT EXISTS."""
    server = f"postgresql://dsv4@/postgres?host={postgres_server}"
    engine = database(server).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sql.text("CREATE DATABASE fresh"))
    engine.dispose()
    fresh, together = server.replace("/postgres?", "/fresh?"), Barrier(8)

    def opened(number: int) -> None:
        together.wait(60)
        RolloutQueue(fresh, run=str(number)).close()
        together.wait(60)
        open_store(fresh).close()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened, range(8))) == [None] * 8


@pytest.mark.postgres
def test_a_worker_does_not_wait_for_requests_that_another_is_taking(postgres_server: str, tmp_path: Path) -> None:
    """SQLite has one writer at a time; PostgreSQL skips rows that are locked."""
    one, other = (RolloutQueue(f"postgresql://dsv4@/postgres?host={postgres_server}", run=str(tmp_path)) for _ in "ab")
    one.add(1, requests(3))
    mine = sql.select(REQUESTS.c.id).where(REQUESTS.c.run == one.name).order_by(REQUESTS.c.id).limit(2)
    with one._begin() as connection:
        held = set(connection.execute(mine.with_for_update()).scalars())
        (lease,) = other.lease("w", 3)  # would wait for ever
        assert len(held) == 2 and lease.id not in held
    assert {lease.id for lease in other.lease("w", 3)} == held
    for queue in (one, other):
        queue.close()
