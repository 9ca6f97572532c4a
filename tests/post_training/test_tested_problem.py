"""Rows with unit tests: what a test may be, rewards by the share that pass, and what is refused."""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dsv4 import notices
from dsv4.post_training import program_tests, tested_problem
from dsv4.post_training.data_problems import read_problems
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.sandbox.limits import Limits
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
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
        (["f(1)", 3], "test 2 is 3; allowed: Python statements, or an object with input and output"),
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
        pytest.param(["a" + ".b" * 100_000], "test 1 is Python nested too deep to compile", id="a deep text"),
        pytest.param(["-" * 100_000 + "1"], "test 1 is Python nested too deep to compile", id="a deep sum"),
        ([{"input": "", "output": "", "tolerance": 0.1}], "tolerance of test 1 is 0.1 without fn_name; allowed: with"),
        ([{"input": None, "output": ""}], "input of test 1 is None; allowed: a text"),
        ([{"input": [], "output": date(2026, 1, 2), "fn_name": "f"}], "output of test 1 is no JSON .*date is not JSON"),
        ([{"input": [b"x"], "output": 1, "fn_name": "f"}], "input of test 1 is no JSON .*bytes is not JSON"),
        (
            [{"input": [], "output": math.nan, "fn_name": "f"}],
            "output of test 1 is no JSON .*; allowed: values of",
        ),
        ('[{"input": [], "output": 1e999, "fn_name": "f"}]', "output of test 1 is no JSON"),
        *(
            ([{"input": [], "output": 1, "fn_name": "f", "tolerance": given}], "tolerance .* allowed: a finite number")
            for given in (10**400, math.inf, math.nan, True, "1", date(2026, 1, 2))
        ),
        ([{"input": [], "output": 1, "fn_name": "f", "tolerance": -1}], "tolerance of test 1 is -1; allowed: a finite"),
    ],
)
def test_what_is_no_test_is_refused(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


@pytest.mark.parametrize(
    "code",
    [
        "",
        "# x",
        "def check(candidate):\n    assert candidate(2) == 4",
        "'''A text.'''\nimport math\nfrom os import path\nclass A:\n    pass\nasync def b(): ...\npass",
        "METADATA = {'author': 'x', 'dataset': ['y', -1]}\nX: int\ndef check(candidate):\n    assert candidate(2) == 4",
        "def check(f):\n    assert f(2) == 4\nif __name__ == '__main__':\n    check(f)",
    ],
)
def test_statements_that_test_nothing_are_refused(code: str) -> None:
    with pytest.raises(ValueError, match="test 1 tests nothing; allowed: statements that raise, as an assert or"):
        read_tests([code])
    assert read_tests([f"{code}\ncheck(f)"])


def test_rows_that_no_parser_takes_are_named_and_the_rest_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_told", set())
    call = {"fn_name": "f", "input": [], "output": 1}
    tests = [["a" + ".b" * 100_000], ["-" * 100_000 + "1"], [call | {"tolerance": 10**400}]]
    path = rows(tmp_path, {"prompt": "x", "tests": [call]}, *({"prompt": "x", "tests": one} for one in tests))
    with caplog.at_level(logging.WARNING):
        assert len(read_problems([path], rewarded=False)) == 1
    assert [message.split(": test")[0] for message in caplog.messages[:2]] == [f"refused: {path}:{n}" for n in (2, 3)]
    assert f"{path}:4: tolerance of test 1 is 1000" in caplog.messages[2]


def test_a_call_may_return_none() -> None:
    (test,) = read_tests(
        [{"fn_name": "f", "input": [None], "output": None, "type": None, "tolerance": None, "testtype": None}]
    )
    assert test == CallTest("test 1", "f", [None], None)


def test_structs_of_parquet_lose_what_a_text_keeps(tmp_path: Path) -> None:
    given = [{"fn_name": "f", "input": [1], "output": one} for one in ({"a": 1, "b": None}, {"a": 1})]
    wanted = {}
    for name, column in (("text", [json.dumps(given)]), ("struct", [given])):
        parquet.write_table(pa.table({"prompt": ["x"], "tests": column}), tmp_path / f"{name}.parquet")
        (problem,) = read_problems([str(tmp_path / f"{name}.parquet")], rewarded=False)
        assert isinstance(problem, TestedProblem)
        wanted[name] = [test.expected for test in problem.tests if isinstance(test, CallTest)]
    assert wanted["text"] == [{"a": 1, "b": None}, {"a": 1}]
    assert wanted["struct"][0] == wanted["struct"][1]


PROGRAM = "x = 1\ns = '```'\n"


@pytest.mark.parametrize(
    "answer",
    [
        PROGRAM,
        *(f"So:\n```{language}\n{PROGRAM}```\nAll." for language in ("python", "py", "python3", "Python", "PY", "")),
        f"Input:\n```text\n2 3\n```\nSo this is it:\n```python\n{PROGRAM}```\n",
        f"```c++\nint x;\n```\n```\n{PROGRAM}```\nmore\n```python\ny = 2\n```",
        f"```text\n2 3\n```python\n{PROGRAM}```",
        f"It is\n```python\n{PROGRAM}",
        f"It is: ```python\n{PROGRAM}```\nDone.",
        f"- ```python\n{PROGRAM}```\nDone.",
        f"1. It is\n   ```python title=x\n{PROGRAM}   ```\n",
        f"````python\n{PROGRAM}````\n```python\ny = 2\n```",
    ],
)
def test_the_program_is_the_first_block_in_python(answer: str) -> None:
    assert program_tests.program_of(answer) == PROGRAM


def test_an_answer_without_a_block_in_python_is_the_program() -> None:
    assert program_tests.program_of("```js\nx\n```\n") == "```js\nx\n```\n"


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
    (problem,) = read_problems([rows(tmp_path, {"prompt": "x", "tests": ["assert True"] * 50})])
    assert isinstance(problem, TestedProblem)
    with Pool(open_sandbox, 1) as pool:
        before = time.monotonic()
        score = program_tests.scored("while True: pass", problem.tests, pool)
    assert time.monotonic() - before < 10
    assert score.fraction == 0.0 and score.outcomes[-1].reason == "not run: 6 tests before it ran out of time"
    assert all(outcome.known for outcome in score.outcomes)


def problem_of(tmp_path: Path, tests: list[Any], partial: bool = False) -> TestedProblem:
    (problem,) = read_problems([rows(tmp_path, {"prompt": "x", "tests": tests, "thinking": False})], partial=partial)
    assert isinstance(problem, TestedProblem)
    return problem


def pool_of(monkeypatch: pytest.MonkeyPatch, limits: Limits) -> Pool:
    pool = Pool(functools.partial(open_sandbox, limits=limits), 1)
    monkeypatch.setattr(program_tests, "sandboxes", lambda: pool)
    return pool


@needs_sandbox
@pytest.mark.parametrize("more", [[], ["assert f(1) == 2"]], ids=["calls", "calls and an assertion"])
def test_a_slow_machine_makes_no_right_program_wrong(
    more: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All tests take longer than one command may; calls share as few commands as that allows."""
    calls = [{"fn_name": "f", "input": [n], "output": 2 * n} for n in range(40)]
    problem = problem_of(tmp_path, [*more, *calls])
    ran: list[Any] = []
    run = NamespaceSandbox.exec
    monkeypatch.setattr(NamespaceSandbox, "exec", lambda *a, **k: ran.append(a) or run(*a, **k))
    with pool_of(monkeypatch, Limits(wall_seconds=3.0)):
        found = problem.explain("import time\ntime.sleep(0.15)\ndef f(x):\n    return 2 * x\n")
    assert (found.value, found.reason) == (1.0, "all tests pass")
    assert 2 <= len(ran) < 41


@needs_sandbox
@pytest.mark.parametrize(
    ("tests", "partial", "value"),
    [
        (["assert f()"] * 30, False, None),
        ([{"fn_name": "f", "input": [], "output": True}] * 30, False, None),
        (["assert not f()", *["assert f()"] * 30], False, 0.0),
        (["assert not f()", *["assert f()"] * 30], True, None),
    ],
    ids=["assertions", "calls", "one that fails", "one that fails, and shares"],
)
def test_time_that_runs_out_is_no_wrong_answer(
    tests: list[Any], partial: bool, value: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program_tests, "TOTAL", 2.0)
    problem = problem_of(tmp_path, tests, partial)
    answer = "import time\ndef f():\n    time.sleep(0.3)\n    return True\n"
    with pool_of(monkeypatch, program_tests.LIMITS):
        (found,) = judge([Rollout(0, (1,), (2,), (0.0,), answer, True)], [problem], RewardSettings())
    if value is None:
        assert found.error is not None and "tests were not run: those before them took 2 s" in found.error
    else:
        assert (found.error, found.value) == (None, value)


@needs_sandbox
def test_outcomes_are_in_the_order_of_the_tests(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, TESTS)
    with Pool(open_sandbox, 1) as pool:
        score = program_tests.scored(ADD.replace("a + b", "a - b"), problem.tests, pool)
    assert [outcome.name for outcome in score.outcomes] == [f"test {n}" for n in range(1, 5)]
    assert [outcome.reason.split(":")[0] for outcome in score.outcomes] == [
        "wrong output",
        "exit code 1",
        "wrong answer",
        "exit code 1",
    ]


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
