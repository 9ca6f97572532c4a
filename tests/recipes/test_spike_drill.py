"""The drill: an outlier expert makes a spike, the run goes back, anticipates its routing for a while and ends sane."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "spike_drill.py"
STEPS, HURT_AT = 36, 22


def test_a_damaged_expert_is_found_and_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = runpy.run_path(str(RECIPE)), tmp_path / "run"
    flags = ["--run-dir", str(run_dir), "--steps", str(STEPS), "--hurt-at", str(HURT_AT), "--delay", "2"]
    assert recipe["main"](flags) == 0
    said = capsys.readouterr().out
    assert "back to step 15" in said and "Anticipatory Routing from step 15 to 32" in said
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (event,) = (line for line in lines if line.get("event") == "rollback")
    assert (event["spike_start"], event["step"], event["to"]) == (HURT_AT, HURT_AT + 1, 15)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [*range(HURT_AT + 1), *range(15, STEPS)]
    by_attempt = {(line["attempt"], line["step"]): line for line in lines if "loss" in line}
    # The step before the delay shows is the same step again: same data, same weights, same loss.
    assert by_attempt[0, 15]["loss"] == by_attempt[1, 15]["loss"]
    assert by_attempt[0, 17]["loss"] != by_attempt[1, 17]["loss"]
    assert by_attempt[0, HURT_AT]["clamped"]["layers.2.ffn"] > 0.0 == by_attempt[1, HURT_AT]["clamped"]["layers.2.ffn"]
    assert lines[-1]["loss"] < by_attempt[0, HURT_AT - 1]["loss"] < by_attempt[0, HURT_AT]["loss"]
