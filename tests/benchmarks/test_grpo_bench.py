"""`dsv4 bench grpo`: it runs, every contender samples the same number of tokens, and its run is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ belongs to the checkout, not to the installed package

from benchmarks import grpo, report
from benchmarks.harness import grpo_report
from benchmarks.harness.grpo_rounds import PEAK, ROLLOUTS, TOGETHER, UPDATES, floors
from benchmarks.harness.policy_trainers import Prompts, Shape
from benchmarks.harness.results import Row, Run, append, read
from benchmarks.harness.sums import EVEN, reward_of
from benchmarks.harness.training_parts import muon_operations
from dsv4.config import ModelConfig, nano_path
from dsv4.kernels import backends

ENVIRONMENT = Path(__file__).parents[2] / "build" / "trl"  # of `make trl`


def test_a_run_without_trl_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grpo.main(["--quick", "--no-gate", "--threads", "1", "--busy", "--results", str(tmp_path)]) == 0
    assert "UNGATED" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.jsonl")
    (run,) = read(file)
    assert grpo_report.command(run) == "`dsv4 bench grpo --busy`"
    for name in grpo.OURS:
        for what in (ROLLOUTS, UPDATES, TOGETHER):
            assert _row(run, name, what).median > 0 and _row(run, name, what).floor > 0
        peak = _row(run, name, PEAK)
        assert peak.median > 0
        if backends.native_module() is not None:
            assert run.settings["differences"][name] == 0.0


def _row(run: Run, name: str, what: str) -> Row:
    return next(row for row in run.rows if (row.peer, row.measure) == (name, what))


@pytest.mark.skipif(not (ENVIRONMENT / ".trl").exists(), reason="TRL is not installed: make trl")
def test_trl_takes_its_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--no-gate", "--threads", "1", "--busy", "--results", str(tmp_path)]
    assert grpo.main([*options, "--trl", str(ENVIRONMENT)]) == 0
    assert "trl" in capsys.readouterr().out
    (run,) = read(next(tmp_path.glob("*.jsonl")))
    assert _row(run, "trl", TOGETHER).median > 0
    assert run.settings["differences"]["trl, even"] < 1e-4


def test_a_recorded_run_is_on_the_page(tmp_path: Path) -> None:
    rows = [
        Row(name, what, 4096, [rate], 9e3) for name, rate in (("dsv4", 900.0), ("trl", 90.0)) for what in (ROLLOUTS,)
    ]
    settings = {
        "busy": False, "prompt": 60, "shape": {"prompts": 4, "group": 8, "tokens": 128, "updates": 2},
        "differences": {"dsv4": 0.0, "trl": 0.5, "trl, even": 6e-6},
    }  # fmt: skip
    run = Run(grpo_report.SCENARIO, rows, {"fp32_flop_per_s": 1e11}, settings)
    run.hardware = {"cpu": "x", "isa": "y", "cores": 2}
    append(tmp_path / "this.jsonl", run)
    page = report.document(tmp_path)
    assert "### grpo" in page and "dsv4 bench grpo --trl" in page and "| rollouts " in page and "10.00" in page
    assert "5.0e-01" in page and "6.0e-06" in page


def test_floors_add_up() -> None:
    config, shape = ModelConfig.from_pretrained(nano_path()), Shape(4, 8, 128, 2)
    ceilings = {"fp32_flop_per_s": 1e9, "bf16_flop_per_s": 2e9}
    found = floors(config, shape, 60, (), ceilings)
    assert found[TOGETHER] == pytest.approx(found[ROLLOUTS] + found[UPDATES])
    with_muon = floors(config, shape, 60, [(64, 64)], ceilings)
    assert with_muon[UPDATES] - found[UPDATES] == pytest.approx(2 * muon_operations([(64, 64)]) / 2e9)
    assert shape.answers == 32 and shape.sampled == 4096


def test_prompts_and_rewards() -> None:
    prompts = Prompts(nano_path())
    assert len({len(prompts.ids(number)) for number in range(8)}) > 3
    assert len({len(prompts.ids(EVEN + number)) for number in range(8)}) == 1
    assert 0 <= reward_of("a") < 1 and reward_of("a") != reward_of("b")
    assert json.dumps(prompts.text(0)).count("sum of") == 1


@pytest.mark.parametrize(
    ("options", "said"), [(["--trl", "nowhere"], "make trl"), (["--group", "3", "--updates", "7"], "a divisor of 12")]
)
def test_wrong_options_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert grpo.main([*options, "--no-gate"]) == 1
    assert said in capsys.readouterr().err
