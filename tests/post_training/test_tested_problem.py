"""Rows with unit tests: what a test may be, rewards by the share that pass, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dsv4.post_training import program_tests, tested_problem
from dsv4.post_training.data_problems import read_problems
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.pool import Pool
from dsv4.post_training.sandbox.substrates import missing, open_sandbox
from dsv4.post_training.sandbox.unit_tests import AssertionTest, CallTest, OutputTest
from dsv4.post_training.tested_problem import MOST, TestedProblem, read_tests

needs_sandbox = pytest.mark.skipif(missing("namespaces") is not None, reason=str(missing("namespaces")))
ADD = "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n"
TESTS: list[Any] = [
    {"type": "stdin_stdout", "input": "2 3\n", "output": "5\n", "fn_name": None},
    {"fn_name": "add", "input": [[1], [2]], "output": [1, 2]},
    {"fn_name": "add", "input": [0.1, 0.2], "output": 0.3, "tolerance": 1e-9},
    "assert add('a', 'b') == 'ab'",
]


def rows(tmp_path: Path, *given: dict[str, Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


def test_texts_calls_and_statements_are_tests() -> None:
    assert read_tests(TESTS) == (
        OutputTest("test 1", "2 3\n", "5\n"),
        CallTest("test 2", "add", [[1], [2]], [1, 2]),
        CallTest("test 3", "add", [0.1, 0.2], 0.3, 1e-9),
        AssertionTest("test 4", "assert add('a', 'b') == 'ab'"),
    )
    assert read_tests(json.dumps(TESTS)) == read_tests(TESTS), "of a column of Parquet"


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "tests is a list of 0; allowed: a list of 1 to 100 tests"),
        (["x = 1"] * (MOST + 1), "tests is a list of 101; allowed"),
        ({"input": "", "output": ""}, "tests is dict; allowed: a list"),
        ("assert True", "tests is a text that is no JSON"),
        (["x ="], "test 1 is no Python: invalid syntax"),
        (["x\0"], "test 1 is no Python: "),
        (["x = 1", 3], "test 2 is 3; allowed: Python statements, or an object with input and output"),
        ([{"input": "1"}], r"test 1 has \['input'\]; allowed: input and output, and fn_name, type, tolerance"),
        ([{"input": "", "output": "", "stdin": ""}], "test 1 has .*'stdin'"),
        ([{"input": [1], "output": "1"}], r"input of test 1 is \[1\]; allowed: a text, or with fn_name other values"),
        ([{"input": "\ud800", "output": "1"}], "input of test 1: character 0 is U\\+D800"),
        (
            [{"input": "1", "output": "1", "fn_name": "f"}],
            "input of test 1 is '1'; allowed with fn_name: a list",
        ),
        (
            [{"input": [1], "output": 1, "fn_name": "f("}],
            r"fn_name of test 1 is 'f\('; allowed: the name of a",
        ),
        ([{"input": "", "output": "", "type": "function_call"}], "type of test 1 is 'function_call' without fn_name"),
        ([{"input": [], "output": 1, "fn_name": "f", "type": "other"}], "'other' with fn_name; allowed: function_call"),
        ([{"input": [], "output": 1, "fn_name": "f", "tolerance": -1}], "tolerance of test 1 is -1; allowed: a number"),
    ],
)
def test_what_is_no_test_is_refused(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


def test_tests_stand_alone_in_a_row(tmp_path: Path) -> None:
    path = rows(tmp_path, {"prompt": "x", "tests": TESTS, "answer": "y"})
    with pytest.raises(ValueError, match="rows.jsonl:1: tests beside an answer or a rubric; allowed: tests alone"):
        read_problems([path])


@needs_sandbox
@pytest.mark.parametrize("partial", [False, True])
def test_the_reward_is_by_the_tests(partial: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["Add."], "tests": [json.dumps(TESTS)], "thinking": [False]}), path)
    (problem,) = ProblemsSection(data=(str(path),), partial=partial).rows()
    assert isinstance(problem, TestedProblem) and problem.key == f"{path}, row 1"
    answers = {
        f"So:\n```python\n{ADD}```\nThat is all.": (1.0, "all tests pass"),
        ADD.replace("print(", "print(1 + "): (0.75, "test 1: wrong output"),
        ADD.replace("a + b", "a - b"): (0.0, "test 1: wrong output"),
        "": (0.0, "no program"),
    }
    found = judge([Rollout(0, (1,), (2,), (0.0,), answer, True) for answer in answers], [problem], RewardSettings())
    for (value, reason), reward in zip(answers.values(), found, strict=True):
        assert reason in reward.reason and reward.value == (value if partial else float(value == 1.0))
        assert reward.correct == (value == 1.0) and reward.error is None


@needs_sandbox
def test_all_tests_of_a_program_have_its_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program_tests, "SECONDS", 0.3)
    monkeypatch.setattr(program_tests, "LIMITS", Limits(wall_seconds=1.0))
    (problem,) = read_problems([rows(tmp_path, {"prompt": "x", "tests": ["pass"] * 50})])
    assert isinstance(problem, TestedProblem)
    with Pool(open_sandbox, 1) as pool:
        before = time.monotonic()
        score = program_tests.scored("while True: pass", problem.tests, pool)
    assert time.monotonic() - before < 10
    assert score.fraction == 0.0 and score.outcomes[-1].reason == "not run: the tests before it took 1 s"


def test_rows_with_tests_need_a_sandbox_where_they_are_rewarded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tested_problem, "missing", lambda: "bubblewrap is not installed")
    path = rows(tmp_path, {"prompt": "x", "tests": TESTS})
    with pytest.raises(ValueError, match="tests of programs run in a sandbox.* bubblewrap is not installed"):
        read_problems([path])
    assert len(read_problems([path], rewarded=False)) == 1, "distillation asks, and runs nothing"


def test_partial_rewards_of_rows_need_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tested_problem, "missing", lambda: None)
    plain = rows(tmp_path, {"prompt": "x", "answer": "y"})
    with pytest.raises(ValueError, match="partial without domains; allowed: .* or with tests in problems.data"):
        ProblemsSection(data=(plain,), partial=True).source()
    tested = rows(tmp_path, {"prompt": "x", "tests": ["assert f() == 1"]})
    asked = ProblemsSection(data=(tested,), domains=("tools",), partial=True).source()
    assert {asked.problem(number).domain for number in range(20)} == {"data", "tools"}
