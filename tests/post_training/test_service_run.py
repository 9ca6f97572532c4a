"""GRPO over the rollout service: the bits of a run without it, staleness, workers that die, what cannot be reached."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sql
import torch

from dsv4.engine import SamplingParams
from dsv4.kernels import backends
from dsv4.post_training.distillation import DistillationRun, DistillationSettings
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.groups import Asked
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipes import DistillRecipe, ServiceSection
from dsv4.post_training.replay import ReplaySettings
from dsv4.post_training.rollout_service.launchers import WorkerProcess
from dsv4.post_training.rollout_service.lookahead import Lookahead
from dsv4.post_training.rollout_service.process import WorkerPlan
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.records import LoggedToken, NewRequest, Step
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.rollout_service.staleness import Staleness, staleness
from dsv4.post_training.rollout_service.tables import METADATA, REQUESTS, ServiceError, database
from dsv4.post_training.rollout_service.weights import PublishedWeights
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.training.schedule import Schedule

from .goals import Counted
from .service_run import SETTINGS, ForkedLauncher, make_run, make_service, metrics, same, small_folder
from .small_policy import TextProblem, TextProblems, has_f, small_policy

TIMES = {
    "seconds",
    "tokens_per_second",
    "sampling_seconds",
    "staleness",
    "staleness_max",
    "stale_share",
    "peak_memory_bytes",
}
TIMES.add("worker_deaths")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, folder: Path):
    """A run without the service, that draws from the likeliest tokens only."""
    settings = replace(
        SETTINGS, sampling=SamplingParams(temperature=0.9, top_p=0.8), replay=ReplaySettings(routing=True, indexer=True)
    )
    run = make_run(tmp_path_factory.mktemp("local") / "run", folder, settings=settings)
    run.run()
    return run


def test_a_synchronous_service_gives_the_bits_of_a_run_without_it(folder: Path, filtered, tmp_path: Path) -> None:
    """With masks and choices; the worker is killed in the middle, and the learner stops and goes on."""
    killed: list[int] = []
    for stop in (2, None):
        service = make_service(tmp_path, folder, workers=1)
        run = make_run(tmp_path, folder, service, filtered.settings)

        ended = threading.Event()

        def kill(service=service, ended=ended) -> None:
            while not killed and not ended.wait(0.01):
                if service.queue.num_tokens():
                    killed.append(service.processes()[0].pid)  # type: ignore[attr-defined]
                    os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        run.run(stop)
        ended.set()
        thread.join()
    assert killed
    assert same(run, filtered)
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(tmp_path)]
    assert lines == [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(filtered.run_dir)]
    assert {line["staleness_max"] for line in metrics(tmp_path)} == {0}


def test_an_asynchronous_run_learns_from_what_is_at_most_as_old_as_allowed(folder: Path, tmp_path: Path) -> None:
    service = make_service(tmp_path, folder, workers=1, max_staleness=1)
    settings = replace(SETTINGS, replay=ReplaySettings(routing=True, indexer=True))
    make_run(tmp_path, folder, service, settings, steps=4, save_every=3).run()
    lines = metrics(tmp_path)
    assert len(lines) == 4 and {line["staleness_max"] for line in lines} == {0, 1}  # and some was sampled ahead
    assert {line["stale_share"] for line in lines} == {0.0}
    for line in lines:
        assert (line["staleness_max"] > 0) == (line["staleness"] > 0.0)
        assert line["staleness_max"] == 0 or "train_serve_difference" not in line
    assert sum(line["updates"] for line in lines) > 2
    if backends.native_module() is not None:  # what later weights would choose otherwise was kept
        assert {line["routing_differences"] for line in lines if line["updates"] and not line["staleness_max"]} <= {0}
        assert any(line["routing_differences"] for line in lines if line["staleness_max"] and line["updates"])


@pytest.mark.slow
@pytest.mark.usefixtures("chatty")
@pytest.mark.parametrize("ahead", [0, 1])
def test_episodes_go_through_the_service(ahead: int, folder: Path, tmp_path: Path) -> None:
    """Their environments stay with the learner. Synchronously, the bits are those of a run without the service."""
    log: list[str] = []
    goals = SimpleNamespace(problem=lambda number: Counted(number, log))
    settings = replace(
        SETTINGS, sampling=SamplingParams(stop_token_ids=tuple(range(2, 500, 4))), episodes=EpisodeLimits(turns=3)
    )
    options: dict[str, Any] = {"settings": settings, "problems": goals, "max_model_len": 640}
    service = make_service(tmp_path / "run", folder, workers=2, max_staleness=ahead, max_model_len=640)
    run = make_run(tmp_path / "run", folder, service, **options)
    run.run()
    lines = metrics(tmp_path / "run")
    assert sum(line["updates"] for line in lines) > 0 and {line["staleness_max"] for line in lines} <= {0, ahead}
    if ahead == 0:
        local = make_run(tmp_path / "local", folder, **options)
        local.run()
        assert same(run, local)
        assert not list((tmp_path / "run" / "episodes").iterdir()) and log.count("open") == log.count("close")


def rollout(place: int, *drawn_by: tuple[int, int]) -> Rollout:
    return Rollout(0, (1,), (2, 3), (-1.0, -1.0), "no" if place else "if", False, drawn_by=drawn_by)


def test_groups_with_older_tokens_than_allowed_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, folder, make_service(tmp_path, folder, max_staleness=2))
    run.position.step = 5
    problem = TextProblem(0, has_f)
    for oldest, stale in ((5, False), (3, False), (2, True)):
        drawn = [rollout(0, (oldest, 1), (5, 1)), rollout(1, (5, 2))]
        (group,) = run._judged(Asked([problem], list(drawn)))
        assert (group.stale, group.informative) == (stale, not stale)
        assert staleness(drawn, 5) == Staleness(5 - oldest, 5 - oldest, 4)


def test_answers_come_in_the_order_in_which_they_were_asked() -> None:
    later, ahead = threading.Event(), Lookahead[int](3, 2)

    def ask(number: int) -> int:
        assert number == 4 or later.wait(60.0)  # the first is ready last
        later.set()
        return number

    ahead.fill(2, lambda number: lambda: ask(number))
    assert ahead.take(2) == [3, 4]
    ahead.close()


def test_a_run_with_a_budget_of_seconds_samples_ahead_beyond_the_steps_of_its_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, folder, make_service(tmp_path, folder, max_staleness=1), steps=1, seconds=600.0)
    monkeypatch.setattr(run, "_ask", lambda _, first, count: Asked([TextProblem(first, has_f)], [rollout(0)]))
    run._ahead, run.position.step = Lookahead(0, 4), 3
    for numbers in ([0, 1], [2, 3]):
        asked = run._next(lambda first: SimpleNamespace(), 2)  # type: ignore[arg-type, return-value]
        assert [problem.number for problem in asked.problems] == numbers  # type: ignore[attr-defined]
    assert run._ahead._next == 6  # those of the next step too
    run._ahead.close()


@dataclass
class Ending:
    """Workers that have ended when one looks, or never do anything."""

    how: str | None
    started: list[str] = field(default_factory=list)
    killed: int = 0

    def start(self, plan: WorkerPlan, place: int) -> Ending:
        self.started.append(plan.name)
        return self

    def ended(self) -> str | None:
        return self.how

    def kill(self) -> None:
        self.killed += 1

    def close(self) -> None:
        self.how = None


def test_workers_of_a_run_that_was_taken_back_see_no_later_weights(folder: Path, tmp_path: Path) -> None:
    published = PublishedWeights(tmp_path / "service" / "weights")
    model = small_policy()[0].model
    for latest, seen in ((7, None), (5, 5)):
        published.publish(latest, model)
        with make_service(tmp_path, folder, Ending(None)).running(0, 5):
            assert published.latest() == seen


def test_workers_of_an_earlier_learner_write_no_more_when_requests_are_forgotten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, lost = make_service(tmp_path, folder, Ending(None)), list[set[int]]()
    service.queue.add(1, [NewRequest(0, (3, 4), {"seed": 1})])
    (lease,) = service.queue.lease("w", 1)
    keep = service.queue.keep

    def noted(first: int) -> None:
        lost.append(service.queue.write([Step(lease, 0, [LoggedToken(5, -1.0, 0)])]))
        keep(first)

    monkeypatch.setattr(service.queue, "keep", noted)
    with service.running(1, 0):
        assert lost == [{lease.id}] and not service.queue.known(1)


def test_workers_that_end_at_once_end_the_run_in_words(folder: Path, tmp_path: Path) -> None:
    launcher = Ending("ended with status 1 (no memory; worker-0.log)")
    service = make_service(tmp_path, folder, launcher, max_deaths=3)
    with pytest.raises(ServiceError, match=r"have ended 3 times without a token in between; the last ended with .*no"):
        make_run(tmp_path, folder, service).run()
    assert len(launcher.started) == 4


def test_a_worker_that_takes_long_to_end_holds_up_nothing() -> None:
    def wait(seconds: float) -> None:
        raise subprocess.TimeoutExpired("worker", seconds)

    worker = object.__new__(WorkerProcess)
    worker._process = SimpleNamespace(kill=lambda: None, stdin=io.BytesIO(), wait=wait)  # type: ignore[assignment]
    worker.kill()


def test_workers_that_do_nothing_are_ended_and_then_the_run_in_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dsv4.post_training.rollout_service.service.LOOK_SECONDS", 0.1)
    launcher = Ending(None)
    service = make_service(tmp_path, folder, launcher, workers=1, silence_seconds=3.0, lease_seconds=0.2)
    run, ended = make_run(tmp_path, folder, service), threading.Event()

    def lease() -> None:
        while not ended.wait(0.05) and not (launcher.started and service.queue.lease(launcher.started[0], 4)):
            pass

    leased = threading.Thread(target=lease)
    leased.start()
    try:
        with pytest.raises(
            ServiceError, match=r"no rollout worker has written a token for \d+ s; the queue is sqlite:"
        ):
            run.run()
    finally:
        ended.set()
        leased.join()
    assert launcher.killed > 1 and "was silent for 0.2 s and is ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:secret@127.0.0.1:1/x", r"postgresql://me:\*\*\*@127.0.0.1:1/x cannot be used: connection"),
        ("mysql://here/x", r"mysql://here/x .*allowed: sqlite:///FILE, or postgresql://"),
        ("nothing", "nothing cannot be used: .*allowed: sqlite:///FILE"),
        ("sqlite:////no/such/folder/q.db", "q.db cannot be used: unable to open database file"),
    ],
)
def test_a_queue_that_cannot_be_reached_is_named(url: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=message):
        make_service(tmp_path, folder, url=url)


def test_a_run_ends_in_words_with_its_queue_and_goes_on_with_a_new_one(
    queue_url: str, folder: Path, filtered, tmp_path: Path
) -> None:
    launcher, ended, engine = Ending(None), threading.Event(), database(queue_url)

    def rename(name: str, to: str) -> None:
        with engine.begin() as connection:
            connection.execute(sql.text(f"ALTER TABLE {name} RENAME TO {to}"))

    def lose() -> None:
        while not ended.wait(0.01):
            if launcher.started and service.queue.open_batches():
                rename(REQUESTS.name, "lost")  # not DROP, which holds one table while it waits for another, as a run
                return

    service = make_service(tmp_path, folder, launcher, url=queue_url, workers=1)
    loser = threading.Thread(target=lose)
    loser.start()
    try:
        with pytest.raises(ServiceError, match="the rollout queue .* cannot be used: .*(no such table|does not exist)"):
            make_run(tmp_path, folder, service, filtered.settings).run()
    finally:
        ended.set()
        loser.join()
    rename("lost", REQUESTS.name)
    METADATA.drop_all(engine)
    engine.dispose()
    again = make_run(
        tmp_path, folder, make_service(tmp_path, folder, ForkedLauncher(), queue_url, workers=1), filtered.settings
    )
    again.run()
    assert same(again, filtered)


def test_runs_share_a_database_and_masks_come_back(queue_url: str, tmp_path: Path) -> None:
    names = [f"{tmp_path}-{name}" for name in "ab"]
    one, other = (RolloutQueue(queue_url, run=name) for name in names)
    asked = [NewRequest(0, (1, 2), {"seed": 1}), NewRequest(1, (3,), {"seed": 2})]
    for problem, queue in ((0, one), (3, other)):
        queue.add(2**62, asked, problem, version=problem)
    assert other.lease("early", 9, version=2) == []  # its weights are too old
    (lease,) = one.lease("w", 9, version=2, workers=2)  # half of them
    tokens = [LoggedToken(5, -0.1, 2, bytes(range(200))), LoggedToken(6, -0.2, 2)]
    assert one.write([Step(lease, 0, tokens, "stop")]) == set() and one.num_tokens() == 2 and other.num_tokens() == 0
    assert one.finished(2**62)[0].tokens == tuple(tokens) and one.open_batches() == {2**62}
    (rest,) = one.lease("w", 9)
    one.release("w")
    assert one.write([Step(rest, 0, [LoggedToken(1, -1.0, 0)])]) == {rest.id}  # it was given to others
    assert one.lease("v", 9)[0].id == rest.id
    one.keep(1)
    other.take_back(version=2)  # asked with later weights, before that
    assert not one.known(2**62) and not other.known(2**62)
    orphans, workers = (RolloutQueue(queue_url, run=names[0], learner=one.new_learner()) for _ in range(2))
    one.add(2**61, asked, problem=5)
    assert orphans.lease("w", 9) == [] and len(workers.lease("w", 9)) == 2  # its learner was killed, and goes on
    for queue in (one, other, orphans, workers):
        queue.close()


def test_distillation_samples_by_the_service_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    def made(place: Path, service: RolloutService | None) -> DistillationRun:
        policy, optimizer = small_policy()
        with torch.no_grad():
            policy.model.norm.weight.mul_(2.0)  # not the teacher, of which there would be nothing to learn
        teachers = Teachers({"default": Teacher(folder)}, place / "hidden", policy.model.config.vocab_size)
        loop = LoopSettings(2, Schedule(0.05, 0, 0.0), prompts=2, max_tokens=6, save_every=1)
        settings = DistillationSettings(samples=2)
        return DistillationRun(
            policy, optimizer, TextProblems(has_f), teachers, loop, settings, place, quiet=True, service=service
        )

    alone = made(tmp_path / "alone", None)
    served = made(tmp_path / "served", make_service(tmp_path / "served", folder, workers=1))
    alone.run()
    served.run()
    want = dict(alone.policy.model.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in served.policy.model.named_parameters())
    with pytest.raises(ValueError, match="max_staleness is 1 in distillation"):
        DistillRecipe(service=ServiceSection(workers=1, max_staleness=1))
