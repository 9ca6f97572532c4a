"""Pictures of runs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from dsv4.training.plots import draw_run, read_metrics, smooth

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder: Path, tail: str = "") -> Path:
    folder.mkdir()
    rows = [
        {
            "step": step, "stage": "dense" if step < 40 else "sparse", "tokens": 100 * (step + 1), "lr": 1e-3,
            "loss": 5 / (step + 1), "mtp_loss": 6 / (step + 1), "indexer_loss": 0.0, "tokens_per_second": 80.0,
        }
        for step in range(100)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def test_a_run_is_drawn_even_if_a_kill_cut_its_last_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", tail='{"step": 100, "sta')
    assert len(read_metrics(run)) == 100
    assert draw_run(run) == run / "losses.png"
    assert (run / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_rewards_is_drawn_without_what_a_step_did_not_measure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    always = {"stage": "grpo", "lr": 1e-3, "reward": -0.1, "tokens_per_second": 9.0}
    rows = [
        always | {"step": step, "tokens": 100 * (step + 1)} | ({"loss": -0.2, "kl": 0.1} if step % 2 else {})
        for step in range(10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = draw_run(tmp_path)
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")


def test_of_steps_run_again_after_a_rollback_the_last_attempt_counts(tmp_path: Path) -> None:
    again = [{"step": 99, "event": "rollback", "to": 98}, {"step": 98, "loss": 7.0}, {"step": 99, "loss": 8.0}]
    rows = read_metrics(write_run(tmp_path / "run", "".join(json.dumps(row) + "\n" for row in again)))
    assert [row["step"] for row in rows] == [*range(100)]
    assert [row["loss"] for row in rows[-3:]] == [5 / 98, 7.0, 8.0]


def test_the_script_draws_runs_and_names_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main = runpy.run_path(str(ROOT / "recipes" / "plot.py"))["main"]
    run = write_run(tmp_path / "run")
    assert main([str(run)]) == 0 and str(run / "losses.png") in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none/metrics.jsonl has no step of a run"):
        main([str(tmp_path / "none")])


def test_without_matplotlib_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.training.plots.find_spec", lambda name: None)
    run = write_run(tmp_path / "run")
    assert draw_run(run) is None and not (run / "losses.png").exists()


def test_the_running_mean_has_a_window_of_a_fiftieth_of_the_run() -> None:
    assert smooth([1.0, 3.0]) == [1.0, 3.0]
    found = smooth([float(n) for n in range(100)])
    assert found[:3] == [0.0, 0.5, 1.5] and len(found) == 100
