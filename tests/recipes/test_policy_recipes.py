"""`dsv4 train grpo` and `dsv4 train distill` from the command line: run, resume, serve, wrong input."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.engine import LLM, SamplingParams
from dsv4.training.export import export_model
from tests.post_training.small_policy import small_policy

pytest.importorskip("reasoning_gym")
from dsv4.checkpoint.atomic import sole_writer
from dsv4.config import nano_path
from dsv4.post_training import recipe_run, recipes, rubric_judge
from dsv4.post_training.policy_run import CALIBRATION_STEPS
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rewards import RewardSettings
from dsv4.post_training.rubric import JudgeQuestion, Verdict
from dsv4.post_training.rubric_judge import RubricJudge
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.qat import as_stored
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
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1] and all(line["peak_memory_bytes"] > 50e6 for line in lines)
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
        ([TASKS, "reward.free=100"], "reward: free is 100 without length; allowed: 0, or length above 0"),
        ([TASKS, "reward.window=100"], "window is 100 without length"),
        ([TASKS, "service.max_staleness=1"], "max_staleness is 1 without workers"),
        ([TASKS, "service.launcher=ray"], "service: launcher is ray without workers; allowed: left out, or workers"),
        ([TASKS, "service.lease_seconds=5"], "lease_seconds is 5.0 without workers"),
        (["problems.data=none.jsonl"], "none.jsonl: no such file"),
        ([TASKS, "problems.check=regex"], "problems.check is 'regex': Input should be 'exact', 'math' or 'schema'"),
    ],
)
def test_wrong_input_is_named(words: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        grpo.main([str(folder), *words, "--run-dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("run.device=cuda:99", "run.device is 'cuda:99'; torch finds"),
        ("run.device=abacus", "run.device is 'abacus'; allowed: cpu"),
        ("sampling.max_model_len=2000000", "sampling.max_model_len is 2000000; allowed: 2 to 1048576"),
        ("sampling.max_model_len=1", "sampling.max_model_len is 1; allowed: 2 to"),
    ],
)
def test_what_the_machine_or_the_model_lacks_is_named_before_the_run(
    key: str, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        grpo.main([str(folder), TASKS, key, "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [grpo.main, distill.main])
def test_a_folder_in_which_another_process_trains_is_left_alone(main: Any, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with sole_writer(run), pytest.raises(SystemExit, match="another process works in .*run; wait"):
        main([str(folder), "problems.tasks=['gcd']", "--run-dir", str(run)])
    assert not run.exists()


def test_an_output_that_is_no_model_is_refused_and_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    run = tmp_path / "runs" / "grpo"
    for out, message in (
        (tmp_path / "notes", "notes holds something else than a model; give a new, an empty or a model folder"),
        (tmp_path / "notes" / "mine.txt", "mine.txt holds something else than a model"),
        (run, f"{run} holds the run's folder"),
        (run.parent, "which the model would replace; give another"),
    ):
        with pytest.raises(SystemExit, match=message):
            grpo.main([str(folder), TASKS, *SHORT, "--run-dir", str(run), "--out", str(out)])
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine" and not run.exists()


def test_an_export_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    model, tokenizer = small_policy()[0].model, tokenizer_files(nano_path(), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="a model folder to overwrite"):
        export_model(model, tokenizer, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "config.json").write_text("{}")
    export_model(model, tokenizer, out)
    assert not (out / "mine.txt").exists() and serves(out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tokenizer"}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_problems_of_a_file_are_trained_on_and_belong_to_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is too long costs its rollouts alone; a run goes on from any folder, on the same rows."""
    short, long = {"prompt": "Say 1", "answer": "1"}, {"prompt": "1 " * 600, "answer": "1"}
    run = tmp_path / "run"
    write_rows(tmp_path / "p.jsonl", [short, long])
    monkeypatch.chdir(tmp_path)
    assert grpo.main([str(folder), "problems.data=p.jsonl", *SHORT, "objective.resample=1", "--run-dir", str(run)]) == 0
    told = "".join(capsys.readouterr().out.split())
    assert "thepromptofp.jsonl:2has1278tokens;allowedbymax_model_len:512;itsrolloutsareleftout" in told
    assert [(line["step"], line["left_out"]) for line in metrics(run)] == [(0, 8), (1, 8)]
    monkeypatch.chdir("/")
    assert grpo.main(["--resume", "--run-dir", str(run)]) == 0
    write_rows(tmp_path / "p.jsonl", [short])
    with pytest.raises(SystemExit, match=r"--resume: p\.jsonl changed since the run in .*; allowed: the same rows"):
        grpo.main(["--resume", "--run-dir", str(run)])


def test_an_effort_that_the_model_has_no_words_for_is_refused(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "Say 1", "answer": "1", "reasoning_effort": 5}])
    with pytest.raises(SystemExit, match=r"p\.jsonl:1: .*reasoning_effort"):
        grpo.main([str(folder), f"problems.data={data}", *SHORT, "--run-dir", str(tmp_path / "run")])


def test_prompts_of_a_file_are_distilled_on(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "Say 1", "domain": "mine/1"}, {"prompt": "1 " * 600}])
    words = [str(folder), "--teacher", f"mine/1={folder}", "--teacher", f"default={folder}", f"problems.data={data}"]
    assert distill.main([*words, *SHORT, "--run-dir", str(tmp_path / "run")]) == 0
    assert set(metrics(tmp_path / "run")[0]["kl_by_teacher"]) == {"mine/1"}


def test_a_run_without_a_model_is_named(tmp_path: Path) -> None:
    for words in ([], [TASKS], ["my.toml"]):
        with pytest.raises(SystemExit, match="no model; give the folder of one before all keys"):
            grpo.main([*words, "--run-dir", str(tmp_path / "run")])


def test_the_config_is_printed_as_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert grpo.main([str(folder), "problems.tasks=['gcd']", "--print-config"]) == 0
    path = tmp_path / "recipe.toml"
    path.write_text(capsys.readouterr().out)
    for words in ([str(folder), str(path)], [str(path)], ["problems.tasks=gcd"]):
        assert grpo.main([*words, "--print-config"]) == 0
        assert capsys.readouterr().out == path.read_text()


def test_a_call_that_was_wrong_leaves_no_run(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), TASKS, "--run-dir", str(tmp_path / "run")]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    definition = json.loads((other / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    for teachers, message in (
        ([], "no teachers"),
        (["default=none"], "no such folder"),
        ([f"gcd={folder}"], "no teacher for problems of number_sorting; there are gcd"),
        ([f"default={folder}", f"default={other}"], "--teacher default is .*model and .*other; allowed: one"),
        ([f"default={other}"], "teacher default .*other. has another tokenizer than .*model: the same token ids"),
    ):
        with pytest.raises(SystemExit, match=message):
            distill.main([*words, *(word for teacher in teachers for word in ("--teacher", teacher))])
        assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="the rollout queue nothing cannot be used"):
        grpo.main([*words, "service.workers=1", "service.url=nothing"])
    assert not (tmp_path / "run").exists()


RUBRIC = "Right answer: 10. Wrong answer: 0."


def judged_files(tmp_path: Path, question: str = "Say f") -> list[str]:
    """Keys of a run of rubric questions, with a known answer, and labelled judgements."""
    row = {"prompt": question, "rubric": RUBRIC, "answer": "f", "thinking": False}
    labelled = [{"question": "Say f", "answer": "f", "label": "good"}, {"question": "f", "answer": "g", "label": "bad"}]
    data = write_rows(tmp_path / "p.jsonl", [row, row | {"rubric": "An f."}])
    judgements = write_rows(tmp_path / "j.jsonl", labelled)
    return [
        *SHORT, f"problems.data={data}", f"judge.data={judgements}", "judge.thinking=false", "judge.max_tokens=4",
        "objective.group_size=4", "objective.resample=1", "sampling.prompts=6",
    ]  # fmt: skip


@pytest.fixture
def half_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model ends no answer: those that are cut off are judged too."""
    monkeypatch.setattr(recipes, "RewardSettings", partial(RewardSettings, judge_cut_off=True))


def test_the_recipe_judges_by_the_policy_of_a_step_ago_and_trains_it_to_judge(
    folder: Path, tmp_path: Path, half_answers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's texts are the small model's own; only how a score is read from them is another."""
    judges: list[RubricJudge] = []
    heads: list[tuple[torch.Tensor, torch.Tensor]] = []
    scores = RubricJudge.scores

    def noted(self: RubricJudge, problems: list, answers: list) -> list[Verdict]:
        judges.append(self)
        heads.append((self.weights.model.head.weight.clone(), policies[0].model.head.weight.detach().clone()))
        return scores(self, problems, answers)

    policies: list[ServedPolicy] = []
    made = recipe_run.make_policy
    monkeypatch.setattr(recipe_run, "make_policy", lambda *given: policies.append(made(*given)) or policies[0])
    monkeypatch.setattr(RubricJudge, "scores", noted)
    monkeypatch.setattr(rubric_judge, "verdict", lambda *given: Verdict(len({*given[2]}) % 11 / 10))
    monkeypatch.setattr(JudgeQuestion, "reward", lambda self, answer: len({*answer}) % 11 / 10)
    words = [str(folder), *judged_files(tmp_path), "optimizer.rate=0.05", "optimizer.warmup_steps=0", "run.steps=3"]
    words += ["judge.prompt=Q {question}\nA {answer}\nR {rubric}", "judge.agreement=side", "judge.max_score=4"]
    assert grpo.main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    lines = metrics(tmp_path / "run")
    assert all(line["updates"] and line["left_out"] == 0 for line in lines)
    assert {"judge_reward", "known_reward", "judge_excess", "judging"} <= {*lines[0]}
    for line in lines:
        assert line["judge_excess"] == pytest.approx(line["judge_reward"] - line["known_reward"])
    (judge,) = {*judges}
    assert (judge.max_tokens, judge.thinking, judge.quantized) == (4, False, True)
    assert (judge.form.max_score, judge.form.agreement, judge.form.prompt[:2]) == (4, "side", "Q ")
    (first, begun), (second, after), (third, _) = heads
    served = as_stored("head.weight", begun)
    assert torch.equal(first, served) and torch.equal(second, served)  # of the policy before its first update
    assert torch.equal(third, as_stored("head.weight", after)) and not torch.equal(third, second)


@pytest.mark.parametrize("question", ["Say f", "f " * 480])
def test_a_judge_without_a_score_or_without_room_costs_its_rollouts_alone(
    folder: Path, tmp_path: Path, half_answers: None, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    """A random model's judgements are nonsense; and a question may fit the policy's context but not the judge's."""
    words = [str(folder), *judged_files(tmp_path, question), "run.steps=1"]
    assert grpo.main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    wanted = "gave no score from 0 to 10" if question == "Say f" else "tokens; allowed by max_model_len: 512"
    assert wanted in told and "left out" in told and ("the judge's prompt for" in told) == (question != "Say f")
    (line,) = metrics(tmp_path / "run")
    assert line["left_out"] > 0 and line["left_out"] % 4 == 0 and "judge_reward" not in line and "judging" in line


@pytest.mark.parametrize("text", ["gcd", "=x", "gcd="])
def test_a_teacher_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: DOMAIN=FOLDER or DOMAIN=FOLDER:WEIGHT"):
        distill.read_teacher(text)
