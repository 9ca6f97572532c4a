"""`dsv4 train v4` killed by SIGKILL, at random moments and behind each write, has the results of a whole run."""

from __future__ import annotations

import json
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.v4_recipe import DOMAINS
from tests.forked import FORKED, HANG, end_behind_a_write, kill_behind_each_write

from .small_v4 import keys, small_base, without_pictures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(missing("namespaces") is not None, reason="programs need a sandbox"),
]
WITH_TIMES = {"README.md", "results.html"}  # of a model folder


class Run:
    """A run in `folder`, and the model folder beside it."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder, self.out = base, folder, folder.with_name(f"{folder.name}-model")

    def start(self, noted: Path | None = None) -> BaseProcess:
        """The command in a process: the first call, or the one that goes on; `noted`: see `end_behind_a_write`."""
        begun = (self.folder / "v4.toml").exists()
        words = ["--resume"] if begun else ["--base-model", str(self.base), *keys()]
        words += ["--run-dir", str(self.folder), "--out", str(self.out)]
        target, arguments = without_pictures, (words,)
        if noted is not None:
            target, arguments = end_behind_a_write, (without_pictures, words, noted, "|".join(DOMAINS))
        process = FORKED.Process(target=target, args=arguments)
        process.start()
        return process

    def finish(self) -> None:
        process = self.start()
        process.join(HANG)
        assert process.exitcode == 0

    def models(self) -> dict[str, bytes]:
        """Weights of every model that a stage left."""
        found = sorted(self.folder.glob("**/model/*.safetensors"))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def result(self) -> dict[str, bytes]:
        """Files of the student's folder, results.json with its scores among them."""
        return {path.name: path.read_bytes() for path in self.out.iterdir() if path.name not in WITH_TIMES}

    def stages(self) -> dict[str, str]:
        """Command of each stage."""
        text = (self.folder / "stages.json").read_text().replace(str(self.folder), "RUN")
        return {stage["name"]: stage["command"] for stage in json.loads(text)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, float]:
    """A run that nobody disturbs, and its seconds."""
    run, started = Run(base, tmp_path_factory.mktemp("whole") / "run"), time.monotonic()
    run.finish()
    return run, time.monotonic() - started


def check_same(killed: Run, whole: Run) -> None:
    assert killed.result() == whole.result()
    assert killed.models() == whole.models()
    assert killed.stages() == whole.stages()
    command = "dsv4 train v4 --budget cpu --base-model BASE"
    assert all(command in (run.out / "README.md").read_text() for run in (killed, whole))


def test_killed_at_random_moments(base: Path, whole: tuple[Run, float], tmp_path: Path) -> None:
    run, rng, kills = Run(base, tmp_path / "run"), random.Random(1), 0
    for _ in range(16):
        process = run.start()
        process.join(rng.uniform(0.0, 0.15) * whole[1])
        process.kill()
        process.join(HANG)
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 8
    run.finish()
    check_same(run, whole[0])


def test_killed_behind_each_write(base: Path, whole: tuple[Run, float], tmp_path: Path) -> None:
    """Of all kinds of files that a run writes, those of one domain stand for those of the others."""
    run, noted = Run(base, tmp_path / "run"), tmp_path / "noted"
    kills = kill_behind_each_write(lambda: run.start(noted))
    assert kills == len(noted.read_text().splitlines()) >= 60
    check_same(run, whole[0])
