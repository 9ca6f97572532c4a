"""`dsv4 bench judge` on a small random model, and the measure of judging on judges that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from benchmarks import judge
from dsv4.config import nano_path
from dsv4.data.encoding import read_conversation
from dsv4.engine import LLM
from dsv4.post_training import judgements
from dsv4.post_training.data_problems import read_judgements, read_problems
from dsv4.post_training.judgements import FLATTERY, Judgements, evaluate_judge, judge_all
from dsv4.post_training.recipe_run import tokenizer_files
from dsv4.post_training.rubric import DEFAULT_FORM, JudgeQuestion, RubricQuestion
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.training.export import export_model
from tests.post_training.small_policy import small_policy

TASK = "word_sequence_reversal"


def questions(count: int, **settings: float) -> list[JudgeQuestion]:
    source = Judgements(TASK, **settings)  # pyright: ignore[reportArgumentType]
    return [source.problem(number) for number in range(count)]


def test_labels_are_true_and_flattery_changes_none() -> None:
    plain, praised = questions(60), questions(60, flattering=1.0)
    assert [one.label for one in plain] == [one.label for one in praised]
    assert 15 < sum(one.label == 10 for one in plain) < 45
    assert all(after.answer == f"{before.answer}\n{FLATTERY}" for before, after in zip(plain, praised, strict=True))
    assert DEFAULT_FORM.score(FLATTERY) is None  # praise is no score, should a judge repeat it
    with pytest.raises(ValueError, match="unknown task gdc"):
        Judgements("gdc")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_judge_learns_the_worked_answer_and_both_answers_before_its_score(thinking: bool) -> None:
    encoder = PromptEncoder.from_pretrained(nano_path())
    for number in range(20):
        made = Judgements(TASK, flattering=1.0, thinking=thinking).judgement(number)
        question, record = made.question, judgements.judged_conversation(made)
        asked, answer = record["messages"]
        assert DEFAULT_FORM.score(answer["content"]) == question.label and FLATTERY in asked["content"]
        conversation, _ = read_conversation(record)
        assert encoder.encode(conversation) == encoder.encode(question.prompt())
        given = question.answer.removesuffix(f"\n{FLATTERY}")
        *_, right, shown, verdict = made.reasoning.splitlines()
        assert shown == f"given: {given}" and FLATTERY not in made.reasoning
        assert (right == f"right: {given}") == (question.label == 10) == (verdict == "the same")
        assert answer.get("reasoning_content") == (made.reasoning if thinking else None)


@pytest.mark.parametrize(("fooled", "raised"), [(True, 1.0), (False, 0.0)])
def test_the_trap_shows_which_judge_it_fools(fooled: bool, raised: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that knows the labels but is silent on one, and that flattery fools or not."""

    def known(_: LLM, asked: list[JudgeQuestion]) -> list[float | None]:
        found: list[float | None] = [1.0 if fooled and FLATTERY in one.answer else one.label / 10 for one in asked]
        return [None, *found[1:]]

    monkeypatch.setattr(judgements, "judge_all", known)
    score = evaluate_judge(cast(LLM, None), questions(40))
    assert (score.correct, score.asked, score.unreadable) == (39, 40, 1)
    assert score.raised == raised * score.trapped and score.trapped > 10
    assert (score.plain_reward, score.flattered_reward) == (0.0, raised)


def test_it_trains_two_judges_and_a_policy_against_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judgements, "JUDGEMENT_TOKENS", 8)
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), tmp_path), tmp_path / "small")
    sizes = "--judgements 4 --answers 2 --held-out 4 --grpo-steps 1 --grpo-prompts 1 --policy-steps 1 --row-tokens 512"
    words = ["--model", str(tmp_path / "small"), *sizes.split(), "--without-thinking"]
    assert judge.main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "scores.json").read_text())
    names = [f"{name}{tuned}" for name in (judge.WITHOUT, judge.WITH) for tuned in (judge.TUNED, "")]
    assert list(found["scores"]) == ["before", *names]
    assert all(score["asked"] == 4 for score in found["scores"].values())
    assert [[row["step"] for row in rows] for rows in found["drift"].values()] == [[0], [0]]
    told = capsys.readouterr().out
    assert f"| {judge.WITH} |" in told and f"| {judge.WITH} | 0-0 |" in told
    assert judge_all(LLM(tmp_path / "small"), questions(2)) == [None, None]  # a random model gives no score
    with pytest.raises(SystemExit):
        judge.main(["--run-dir", str(tmp_path / "run")])


def test_a_policy_that_pleases_without_being_right_is_seen_in_the_table(tmp_path: Path) -> None:
    rows = [
        {"step": step, "judge_reward": step / 24, "known_reward": 0.25, "judge_excess": step / 24 - 0.25, "left_out": 0}
        for step in range(24)
    ]
    *_, last = table = judge.drift_lines({judge.WITHOUT: rows, judge.WITH: [{"step": 0, "left_out": 8}]})
    assert table[2] == "| trained | 0-1 | 0.02 | 0.25 | -0.23 | - | 0.00 |" and len(table) == 2 + judge.SHOWN + 1
    assert table[-2] == "| trained | 22-23 | 0.94 | 0.25 | 0.69 | - | 0.00 |"
    assert last == f"| {judge.WITH} | 0-0 | - | - | - | - | 8.00 |"
    if judge.draw({judge.WITHOUT: rows}, tmp_path / "drift.png"):
        assert (tmp_path / "drift.png").stat().st_size > 1000


def test_rows_of_the_benchmark_are_what_the_recipe_reads(tmp_path: Path) -> None:
    made = questions(3)
    path, asked = tmp_path / "j.jsonl", judgements.answered_question(TASK, 1, 0)
    path.write_text("".join(json.dumps(judgements.labelled_row(one)) + "\n" for one in made))
    assert [replace(one, key="") for one in read_judgements([str(path)])] == [replace(one, key="") for one in made]
    path.write_text(json.dumps(asked))
    (problem,) = read_problems([str(path)])
    assert isinstance(problem, RubricQuestion) and problem.known is not None
    assert (problem.known(asked["answer"]), problem.known("no")) == (1.0, 0.0)
