"""GRPO over the rollout service: the bits of a run without it, staleness, workers that die, what cannot be reached."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.engine import SamplingParams

from .service_run import SETTINGS, make_run, make_service, metrics, same, small_folder

TIMES = {"seconds", "tokens_per_second", "sampling_seconds", "staleness", "staleness_max", "stale_share"}
TIMES.add("worker_deaths")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, folder: Path):
    """A run without the service, that draws from the likeliest tokens only."""
    settings = replace(SETTINGS, sampling=SamplingParams(temperature=0.9, top_p=0.8))
    run = make_run(tmp_path_factory.mktemp("local") / "run", folder, settings=settings)
    run.run()
    return run


def test_a_synchronous_service_gives_the_bits_of_a_run_without_it(folder: Path, filtered, tmp_path: Path) -> None:
    """With sampling masks; one worker is killed in the middle, and the learner stops and goes on."""
    killed: list[int] = []
    for stop in (2, None):
        service = make_service(tmp_path, folder)
        run = make_run(tmp_path, folder, service, filtered.settings)

        def kill(service=service) -> None:
            while not killed:
                time.sleep(0.05)
                if service.queue.num_tokens() > 20:
                    killed.append(service.processes()[0].pid)  # type: ignore[attr-defined]
                    os.kill(killed[0], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        run.run(stop)
        thread.join()
    assert same(run, filtered)
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(tmp_path)]
    assert lines == [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(filtered.run_dir)]
    assert {line["staleness_max"] for line in metrics(tmp_path)} == {0}


def test_an_asynchronous_run_learns_from_what_is_at_most_as_old_as_allowed(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, folder, make_service(tmp_path, folder, workers=1, max_staleness=1), steps=6, save_every=3)
    run.run()
    lines = metrics(tmp_path)
    assert len(lines) == 6 and {line["staleness_max"] for line in lines} <= {0, 1}
    assert {line["stale_share"] for line in lines} == {0.0}
    for line in lines:
        assert (line["staleness_max"] > 0) == (line["staleness"] > 0.0)
        assert line["staleness_max"] == 0 or "train_serve_difference" not in line
    assert sum(line["updates"] for line in lines) > 3
