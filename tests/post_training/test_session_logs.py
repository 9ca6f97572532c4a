"""Logs of environments: a run that is killed goes on with its episodes, and runs no command again that has ended."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")
import dsv4.data.tasks
from dsv4.config import ModelConfig
from dsv4.engine import SamplingParams
from dsv4.post_training.domains.tool_environment import Goal, ShellEnvironment
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.sessions import SessionLogs
from dsv4.post_training.problems import Explained
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.sandbox.supervised import SupervisedSandbox

from ..forked import FORKED
from .goals import Counted
from .service_run import SETTINGS, make_run, metrics, small_folder
from .small_policy import has_f

pytestmark = pytest.mark.skipif(missing("namespaces") is not None, reason=str(missing("namespaces")))
COMMAND = "date +%N >>log; wc -l <log"
TIMES = {"seconds", "tokens_per_second", "sampling_seconds", "peak_memory_bytes"}


class Shelled(Counted):
    """A goal whose episodes run a command that is not idempotent, until they say an f."""

    def environment(self) -> Any:
        return LookedAt(Goal(files={"log": ""}), {"in": "1"})


class LookedAt(ShellEnvironment):
    def outcome(self, answer: str) -> Explained:
        super().outcome(answer)  # reads the file
        return Explained(has_f(answer), "an f")


def train(folder: Path, run_dir: Path, is_last: Callable[[Path], bool]) -> None:
    """A run of two steps, saved at its end; every command that a sandbox runs is noted in `ran`.

    It ends by SIGKILL at the first command at which `is_last(run_dir)`: noted, and not run.
    """
    run_command = SupervisedSandbox.exec

    def noted(self: SupervisedSandbox, *args: Any, **options: Any) -> Any:
        with (run_dir / "ran").open("a") as file:
            file.write("x")
        if is_last(run_dir):
            os.kill(os.getpid(), signal.SIGKILL)
        return run_command(self, *args, **options)

    SupervisedSandbox.exec = noted  # type: ignore[method-assign]
    call = {"name": "run", "arguments": {"command": COMMAND}}
    dsv4.data.tasks.parse_tool_calls = lambda text: [] if has_f(text) else [call]  # type: ignore[assignment]
    settings = replace(
        SETTINGS, group_size=2, resample=1, episodes=EpisodeLimits(turns=3),
        sampling=SamplingParams(stop_token_ids=tuple(range(2, ModelConfig.from_pretrained(folder).vocab_size, 4))),
    )  # fmt: skip
    problems = SimpleNamespace(problem=lambda number: Shelled(number, []))
    options: dict[str, Any] = {"settings": settings, "problems": problems, "max_model_len": 640}
    make_run(run_dir, folder, **options, max_tokens=12, steps=2, save_every=2).run()


def num_ran(run_dir: Path) -> int:
    path = run_dir / "ran"
    return path.stat().st_size if path.exists() else 0


def never(run_dir: Path) -> bool:
    return False


def in_first_step(run_dir: Path) -> bool:
    return num_ran(run_dir) >= 4


def in_second_step(run_dir: Path) -> bool:
    """At the third command behind the first step."""
    if not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        return False
    with (run_dir / "ran_in_second_step").open("a") as file:
        file.write("x")
        return file.tell() >= 3


def run_in_a_process(folder: Path, run_dir: Path, is_last: Callable[[Path], bool] = never) -> None:
    """The run to its end, or to a SIGKILL."""
    run_dir.mkdir(exist_ok=True)
    process = FORKED.Process(target=train, args=(folder, run_dir, is_last))
    process.start()
    process.join(300.0)
    assert process.exitcode == (0 if is_last is never else -signal.SIGKILL)


def test_a_killed_run_runs_no_command_again_that_has_ended(tmp_path: Path) -> None:
    """Killed in its first step, and in the second, whose state is not saved: so both are done again."""
    folder, whole, killed = small_folder(tmp_path), tmp_path / "whole", tmp_path / "killed"
    run_in_a_process(folder, whole)
    lines = metrics(whole)
    assert num_ran(whole) > 8 and any(line["updates"] for line in lines)

    run_in_a_process(folder, killed, in_first_step)
    assert list((killed / "sessions").glob("*/*.snapshots/*"))  # of the episodes that were cut off
    run_in_a_process(folder, killed, in_second_step)
    assert not (killed / "state.pt").exists() and num_ran(killed) < num_ran(whole)
    run_in_a_process(folder, killed)
    assert num_ran(whole) <= num_ran(killed) <= num_ran(whole) + 2  # one may have been cut off by each kill
    rest = [{key: line[key] for key in line if key not in TIMES} for line in metrics(killed)]
    assert rest == [{key: line[key] for key in line if key not in TIMES} for line in lines]
    assert not list((killed / "sessions").iterdir())


def opened(log: Path) -> ShellEnvironment:
    environment = ShellEnvironment(Goal(files={"a": "1\n2"}), {})
    environment.log_to(log)
    return environment


def say(environment: ShellEnvironment, *commands: str) -> list[str]:
    return [environment.call("run", {"command": command}) for command in commands]


def test_an_episode_that_goes_another_way_than_its_log_has_a_log_of_its_own(tmp_path: Path) -> None:
    """Its state is that of its own commands, or it fails: one of them had another result when it ran again."""
    log = tmp_path / "1.jsonl"
    first = opened(log)
    say(first, "echo 1 >a", "echo 3 >>a")
    first.close()
    for _ in range(2):  # the second time from the new log
        second = opened(log)
        assert say(second, "echo 1 >a", "echo 2 >>a; cat a")[1] == "1\n2\nexit code 0"
        assert second.outcome("").value == 1.0
        second.close()
    third = opened(log)
    say(third, "echo 1 >a")
    assert third.outcome("").value == 0.0  # where the log has a command
    third.close()
    fourth = opened(tmp_path / "2.jsonl")
    told = say(fourth, "date +%N", "echo 1")
    fourth.close()
    fifth = opened(tmp_path / "2.jsonl")
    assert say(fifth, "date +%N") == told[:1]
    with pytest.raises(SandboxError, match="the log of 'date .*' is lost, and it gives another result"):
        say(fifth, "echo 2")
    fifth.close()


def test_an_episode_that_goes_on_beyond_a_finished_log_has_a_log_of_its_own(tmp_path: Path) -> None:
    """Its snapshots are removed when the episode is over; other weights may have more to ask."""
    log = tmp_path / "1.jsonl"
    first = opened(log)
    say(first, "echo 1 >a")
    first.finish()
    first.close()
    second = opened(log)
    assert say(second, "echo 1 >a", "echo 2 >>a; cat a")[1] == "1\n2\nexit code 0"
    assert second.outcome("").value == 1.0
    second.finish()
    second.close()
    third = opened(log)
    say(third, "echo 1 >a")
    assert third.outcome("").value == 0.0  # reads the file where the log has a command
    third.close()


def test_logs_go_when_their_problems_are_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = SessionLogs(tmp_path / "sessions")
    logs.keep(3)  # none yet
    for number in (0, 2, 10):
        logs.of(number).mkdir(parents=True)
    foreign = (".DS_Store", ".nfs000000000001", "²")
    for name in foreign:
        (logs.folder / name).touch()
    logs.keep(2)
    assert {path.name for path in logs.folder.iterdir()} == {"2", "10", *foreign}

    def gone(path: Path) -> None:
        path.rmdir()  # another was first
        raise FileNotFoundError(path)

    monkeypatch.setattr(shutil, "rmtree", gone)
    logs.keep(11)
    assert {path.name for path in logs.folder.iterdir()} == {*foreign}
