"""`dsv4 train grpo` and `dsv4 train distill` from the command line: run, resume, serve, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4.engine import LLM, SamplingParams
from dsv4.training.export import export_model
from tests.post_training.small_policy import small_policy

pytest.importorskip("reasoning_gym")
from dsv4.config import nano_path
from dsv4.post_training.policy_run import CALIBRATION_STEPS
from dsv4.post_training.recipe_run import tokenizer_files
from recipes import distill, grpo

SHORT = ("run.steps=2", "sampling.prompts=2", "sampling.max_tokens=5", "sampling.max_model_len=512", "run.save_every=1")
TASKS = "problems.tasks=['gcd', 'number_sorting']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder."""
    root = tmp_path_factory.mktemp("small")
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), root), root / "model")
    return root / "model"


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def serves(folder: Path) -> bool:
    (output,) = LLM(folder).generate("Hi", SamplingParams(max_tokens=3, ignore_eos=True))
    return len(output.token_ids) == 3


def test_grpo_runs_and_its_model_is_served(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), TASKS, *SHORT, "objective.group_size=2", "objective.kl=0.01"]
    assert grpo.main([*words, "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert serves(tmp_path / "out")
    with pytest.raises(SystemExit, match="already holds a run; pass --resume"):
        grpo.main([*words, "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="began with .*, not with"):
        grpo.main([str(nano_path()), "--resume", "--run-dir", str(tmp_path / "run")])
    assert grpo.main(["--resume", "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    files = [sorted((tmp_path / name).glob("*.safetensors"))[0].read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_a_budget_of_seconds_becomes_steps_that_a_resumed_run_keeps(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*SHORT[1:], "run.seconds=0.01", "objective.group_size=2", "objective.resample=1", "run.steps=2"]
    assert grpo.main([str(folder), TASKS, *words, "--run-dir", str(run)]) == 0
    assert [line["step"] for line in metrics(run)] == [*range(CALIBRATION_STEPS + 1)]  # the least after the first plan
    assert metrics(run)[-1]["tokens"] >= metrics(run)[0]["tokens"] > 0
    before = (run / "model" / "model-00001-of-00001.safetensors").read_bytes()
    assert grpo.main([str(folder), "--resume", "--run-dir", str(run)]) == 0
    assert (run / "model" / "model-00001-of-00001.safetensors").read_bytes() == before


def test_distillation_runs_and_its_model_is_served(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), "--teacher", f"gcd={folder}:2", "--teacher", f"default={nano_path()}", TASKS, *SHORT]
    assert distill.main([*words, "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert set(metrics(tmp_path / "run")[0]["kl_by_teacher"]) <= {"gcd", "default"}
    assert serves(tmp_path / "out")
    resume = ["--resume", "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "again")]
    with pytest.raises(SystemExit, match="began with --teacher default=.*nano.*:1.0 gcd=.*:2.0"):
        distill.main([*resume, "--teacher", f"default={folder}"])
    assert distill.main(resume) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["problems.tasks=['gdc']"], "unknown tasks gdc; allowed: "),
        ([], "no tasks; allowed: "),
        (["run.step=3"], "run.step is unknown; the nearest key is run.steps"),
        (["problems.tasks=['gcd']", "problems.weights=[1.0, 2.0]"], "2 weights for 1 tasks"),
        ([TASKS, "reward.length=1.0", "reward.free=600"], "free is 600; allowed: 0 to window - 1, 511"),
        (["--resume"], "holds no run"),
        (["none.toml"], "none.toml: no such file; allowed: a recipe in TOML"),
        ([TASKS, "service.max_staleness=1"], "max_staleness is 1 without workers"),
    ],
)
def test_wrong_input_is_named(words: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        grpo.main([str(folder), *words, "--run-dir", str(tmp_path / "run")])


def test_a_run_without_a_model_is_named(tmp_path: Path) -> None:
    for words in ([], [TASKS]):
        with pytest.raises(SystemExit, match="no model; give the folder of one before all keys"):
            grpo.main([*words, "--run-dir", str(tmp_path / "run")])


def test_the_config_is_printed_as_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert grpo.main([str(folder), TASKS, "--print-config"]) == 0
    path = tmp_path / "recipe.toml"
    path.write_text(capsys.readouterr().out)
    assert grpo.main([str(folder), str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_a_call_that_was_wrong_leaves_no_run(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), TASKS, "--run-dir", str(tmp_path / "run")]
    for teachers, message in (([], "no teachers"), (["--teacher", "default=none"], "no such folder")):
        with pytest.raises(SystemExit, match=message):
            distill.main([*words, *teachers])
        assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="the rollout queue nothing cannot be used"):
        grpo.main([*words, "service.workers=1", "service.url=nothing"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["gcd", "=x", "gcd="])
def test_a_teacher_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: DOMAIN=FOLDER or DOMAIN=FOLDER:WEIGHT"):
        distill.read_teacher(text)
