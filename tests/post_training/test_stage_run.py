"""Stages of a run: skipped when done, timed, stopped and named."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.post_training.stage_run import Stage, StageLog, run_stages
from dsv4.post_training.v4_run import tokens_of
from dsv4.training.stopping import RunStoppedError


def touching(path: Path, words: str = "did it") -> Stage:
    def run() -> Iterator[str]:
        yield words
        path.touch()

    return Stage(path.name, path, 60.0, run)


def test_stages_whose_results_stand_are_skipped_and_the_others_timed(tmp_path: Path) -> None:
    (tmp_path / "first").touch()
    said: list[str] = []
    stages = [touching(tmp_path / name) for name in ("first", "second", "third")]
    run_stages(stages, StageLog(tmp_path), lambda text: said.append(text))
    assert said == [
        "stage 2 of 3, second; left in all: about 2:00",
        "stage 3 of 3, third; left in all: about 1:00",
    ]
    assert [(one.name, one.command) for one in StageLog(tmp_path).times] == [("second", "did it"), ("third", "did it")]


def test_times_of_a_stages_parts_add_up(tmp_path: Path) -> None:
    StageLog(tmp_path).add("student", 2.0)
    StageLog(tmp_path).add("student", 3.0, "dsv4 train distill")
    (time,) = StageLog(tmp_path).times
    assert (time.seconds, time.command) == (5.0, "dsv4 train distill")


def test_sigterm_ends_a_stage_and_its_time_is_kept(tmp_path: Path) -> None:
    def stopped() -> Iterator[str]:
        yield "evaluates"
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:  # as around a reward
            raise AssertionError("a reward's error") from error
        raise AssertionError("the signal was lost")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStoppedError, match="stopped by SIGTERM in stage evaluation"):
        run_stages([Stage("evaluation", tmp_path / "x", 1.0, stopped)], StageLog(tmp_path), print)
    assert signal.getsignal(signal.SIGTERM) is before and StageLog(tmp_path).times[0].name == "evaluation"


def test_the_command_is_in_the_log_before_the_result_stands(tmp_path: Path) -> None:
    """A run that is killed between them goes on with the next stage."""
    stage = touching(tmp_path / "student", "dsv4 train distill")
    noted: list[str] = []

    def run() -> Iterator[str]:
        for command in stage.run():
            yield command
            noted.extend(one.command for one in StageLog(tmp_path).times)

    run_stages([Stage(stage.name, stage.result, 1.0, run)], StageLog(tmp_path), print)
    assert noted == ["dsv4 train distill"]


def test_an_error_names_its_stage(tmp_path: Path) -> None:
    def wrong() -> Iterator[str]:
        yield "writes conversations"
        raise ValueError("no data")

    with pytest.raises(ValueError, match=r"stage data\.code: no data"):
        run_stages([Stage("data.code", tmp_path / "x", 1.0, wrong)], StageLog(tmp_path), print)


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text('[{"name": 1')
    with pytest.raises(ValueError, match=r"stages\.json is damaged"):
        StageLog(tmp_path)


def test_tokens_of_a_run_that_an_older_version_began(tmp_path: Path) -> None:
    """Its first steps have the sum of the sampled tokens alone."""
    rows: list[dict[str, int]] = [{"step": 0, "tokens": 10}, {"step": 1, "tokens": 25}]
    rows.append({"step": 2, "tokens": 30, "trained_tokens": 100})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert tokens_of(tmp_path) == 25 + 100
