"""Rollouts whose workers are killed by SIGKILL at random moments: tokens, log-probabilities and masks of whole ones."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from dsv4.checkpoint import load_model
from dsv4.engine import SamplingParams
from dsv4.post_training.rollout_service.records import Finished, NewRequest
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.served_policy import ServedPolicy

from .service_run import ForkedLauncher, ForkedWorker, make_service, small_folder

Drawn = list[tuple[list[int], list[float], list[bytes]]]
LONGEST_LIFE = 120.0  # seconds without a token, on a machine that does much else
TOKENS_OF_A_LIFE = 8  # at most, and those of the moment until the signal comes
LAST_TOKEN_OF_A_LIFE = 40  # or so, if the signal is late: the answers must not be whole before the last kill


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("small"))


def requests(tokens: int) -> list[NewRequest]:
    """Two requests that end at so many tokens; the second draws from the likeliest alone, and logs from which."""
    params = {"max_tokens": tokens, "ignore_eos": True}
    filtered = {"temperature": 0.9, "top_k": 50, "logprobs_mode": "processed_logprobs"}
    return [
        NewRequest(0, (3, 4, 5, 6, 7), {**params, "seed": 1}),
        NewRequest(1, tuple(range(8, 41)), {**params, **filtered, "seed": 2}),
    ]


def whole(folder: Path, asked: Sequence[NewRequest], max_model_len: int) -> Drawn:
    """What an engine draws that nobody interrupts."""
    model = load_model(folder, weights="widened").requires_grad_()
    with ServedPolicy(model, folder, max_num_seqs=16, max_model_len=max_model_len).serving() as llm:
        params = [SamplingParams(**request.params, logprobs=True) for request in asked]
        outputs = llm.generate([list(request.prompt_token_ids) for request in asked], params)
    return [(output.token_ids, output.logprobs, output.sampling_masks) for output in outputs]


def drawn(finished: Sequence[Finished]) -> Drawn:
    return [
        (
            [token.token_id for token in one.tokens],
            [token.log_probability for token in one.tokens],
            [token.mask for token in one.tokens if token.mask is not None],
        )
        for one in finished
    ]


def waits_for_its_end(free: Path, number: int, tokens: int) -> bool:
    """A worker's `stays`: it has logged enough for one life, and the file `free` is not there yet."""
    return tokens >= LAST_TOKEN_OF_A_LIFE and not free.exists()


def kill_workers(
    service: RolloutService, answer: Future[list[Finished]], kills: int, seed: int
) -> tuple[set[int], int]:
    """Kill workers of a service; their processes, and how many of them died behind tokens since the kill before.

    Each dies after a random time, as long as workers took to start, or behind a few tokens: so while it starts, leases,
    computes the prompt again, decodes or writes.
    """
    rng, killed, behind_tokens = random.Random(seed), set[int](), 0
    began = time.monotonic()
    while not service.queue.num_tokens():
        time.sleep(0.002)
        assert time.monotonic() < began + LONGEST_LIFE and not answer.done()
    start = time.monotonic() - began
    while len(killed) < kills:
        logged = service.queue.num_tokens()
        until, most = time.monotonic() + rng.uniform(0.0, 3.0 * start), logged + rng.randint(1, TOKENS_OF_A_LIFE)
        while time.monotonic() < until and service.queue.num_tokens() < most:
            time.sleep(0.001)
        assert not answer.done(), f"the requests ended after {len(killed)} kills"
        living = [worker for worker in service.processes() if isinstance(worker, ForkedWorker)]
        living = [worker for worker in living if worker.pid not in killed]
        if living:
            process = rng.choice(living).pid
            os.kill(process, signal.SIGKILL)
            killed.add(process)
            behind_tokens += service.queue.num_tokens() > logged
    return killed, behind_tokens


def check(folder: Path, run_dir: Path, url: str, kills: int, tokens: int, workers: int) -> None:
    """Let a service answer requests while its workers are killed; compare with what nobody interrupts."""
    asked, max_model_len, free = requests(tokens), tokens + 64, run_dir / "free"
    launcher = ForkedLauncher(partial(waits_for_its_end, free))
    want = whole(folder, asked, max_model_len)
    service = make_service(
        run_dir, folder, launcher, url, max_model_len=max_model_len, workers=workers, max_deaths=kills + 1
    )
    service.set_options(max_stalled=kills + 1)
    with service.running(0, 1), ThreadPoolExecutor(1) as pool:
        service.publish(1, load_model(folder, weights="widened"))
        answer = pool.submit(service.ask, 1, asked, 0, 1)
        killed, behind_tokens = kill_workers(service, answer, kills, seed=kills)
        free.touch()
        found = answer.result()
    assert len(killed) == kills and launcher.killed == killed, "SIGKILL ended these workers, and no other"
    assert behind_tokens >= kills // 4
    assert [one.error for one in found] == [None, None] and {one.finish_reason for one in found} == {"length"}
    assert drawn(found) == want


def test_a_rollout_goes_on_where_sigkill_ended_its_workers(folder: Path, tmp_path: Path, queue_url: str) -> None:
    check(folder, tmp_path, queue_url, kills=5, tokens=150, workers=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_rollout_killed_200_times_has_the_tokens_of_a_whole_one(folder: Path, tmp_path: Path, queue_url: str) -> None:
    check(folder, tmp_path, queue_url, kills=200, tokens=1500, workers=2)


def first_stops_itself(number: int, tokens: int) -> bool:
    """A worker's `stays`: the first stands still in the middle of its requests."""
    if number == 0 and tokens >= 5:
        os.kill(os.getpid(), signal.SIGSTOP)
    return False


def test_a_rollout_goes_on_where_a_worker_stands_still(
    folder: Path, tmp_path: Path, queue_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGSTOP, as of a machine that hangs: its lease runs out, it is ended, and another goes on from the log."""
    asked, launcher = requests(80), ForkedLauncher(first_stops_itself)
    want = whole(folder, asked, 144)
    service = make_service(tmp_path, folder, launcher, queue_url, lease_seconds=3.0, max_model_len=144, workers=1)
    with service.running(0, 1), ThreadPoolExecutor(1) as pool:
        service.publish(1, load_model(folder, weights="widened"))
        found = pool.submit(service.ask, 1, asked, 0, 1).result()
    assert launcher.started[0] in launcher.killed  # another may have been silent too, on a busy machine
    assert "rollout worker 0 was silent for 3 s and is ended" in capsys.readouterr().out
    assert [one.error for one in found] == [None, None] and drawn(found) == want
