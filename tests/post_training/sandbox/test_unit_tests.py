"""Scores of programs by unit tests in a sandbox."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.result import Result
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from dsv4.post_training.sandbox.unit_tests import (
    AssertionTest,
    CallTest,
    OutputTest,
    Score,
    UnitTest,
    compared,
    run_unit_tests,
    same,
)
from tests.post_training.sandbox.conftest import SMALL, lose

GOOD = """
def add(a, b):
    return a + b

if __name__ == "__main__":
    print(add(*map(int, input().split())))
"""
TESTS: list[UnitTest] = [
    OutputTest("prints the sum", "2 3\n", "5"),
    CallTest("adds", "add", [2, 3], 5),
    AssertionTest("asserts", "assert add(2, 3) == 5\nassert add('a', 'b') == 'ab'"),
]


def reasons(score: Score) -> list[str]:
    return [outcome.reason for outcome in score.outcomes]


def test_a_right_program_passes_every_kind_of_test(sandbox: SupervisedSandbox) -> None:
    score = run_unit_tests(sandbox, GOOD, TESTS)
    assert score.passed and score.fraction == 1.0 and reasons(score) == ["passed"] * 3


def test_a_sandbox_that_is_lost_before_the_answer_is_read_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with NamespaceSandbox(SMALL) as box:
        run = box.exec

        def runs_and_loses(*args: Any, **options: Any) -> Result:
            result = run(*args, **options)
            lose(box)
            return result

        monkeypatch.setattr(box, "exec", runs_and_loses)
        with pytest.raises(SandboxError, match="the sandbox was lost"):
            run_unit_tests(box, GOOD, TESTS[1:2])


def test_a_wrong_program_fails_with_expected_and_got(sandbox: SupervisedSandbox) -> None:
    score = run_unit_tests(sandbox, GOOD.replace("a + b", "a - b"), TESTS)
    assert score.fraction == 0.0
    assert reasons(score) == [
        'wrong output: expected ["5"], got ["-1"]',
        "wrong answer: expected 5, got -1",
        "exit code 1: AssertionError",
    ]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def add(:", "SyntaxError"),
        ("x = 1", "KeyError: 'add'|end of file|expected|NameError"),
        ("import os; os._exit(0)", "wrong output|no answer|ended before"),
        ("import sys; sys.exit(0)", "wrong output|no answer|ended before"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("raise ValueError('broken')", "ValueError: broken"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("while True: pass", "ended by the sandbox: wall time over its limit"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("while True: print('y' * 10000)", "ended by the sandbox: (output|wall time) over its limit"),
        ("open('answer.json', 'w').write('5' * 10); import os; os._exit(0)", "wrong|ended before|no answer"),
        ("import sys; print(sys.stdin.read()); import os; os._exit(0)", "wrong output|no answer|ended before"),
        ("def add(a, b): return object()\nprint(\n1)", "wrong output|not JSON serializable|AssertionError|TypeError"),
        ("\ud800", "SyntaxError|unexpected character"),
    ],
)
def test_a_bad_program_fails_every_test_with_a_reason(sandbox: SupervisedSandbox, program: str, reason: str) -> None:
    score = run_unit_tests(sandbox, program, TESTS, timeout=0.7 if "while True" in program else None)
    assert score.fraction == 0.0, reasons(score)
    for text in reasons(score):
        assert pytest.raises(AssertionError, match=reason).matches(AssertionError(text)), text


@pytest.mark.parametrize("last", ["print('y' * 100_000)", "import sys; sys.stdout.close()"])
def test_what_a_right_program_prints_changes_no_assertion(sandbox: SupervisedSandbox, last: str) -> None:
    assert sandbox.limits.output_bytes < 100_000
    assert reasons(run_unit_tests(sandbox, f"{GOOD}{last}\n", TESTS[2:])) == ["passed"]


FORGERIES = {
    "another exec": "import builtins\nbuiltins.exec = lambda *_: None",
    "another compile": "import builtins\nold = compile\nbuiltins.compile = lambda _, *more: old('', *more)",
    "no assertions": "import builtins\nold = compile\nbuiltins.compile = lambda *a: old(*a, optimize=2)",
    "a token in a descriptor": """
import os
for number in range(3, 20):
    try:
        os.set_blocking(number, False)
        token = os.read(number, 1 << 16).rsplit(b"\\n", 1)[-1]
    except OSError:
        continue
    if len(token) == 32:
        os.write(1, token)
        os._exit(0)
""",
    "an order in a frame's globals": """
import os, sys
frame = sys._getframe()
while frame:
    if "order" in frame.f_globals:
        os.write(1, frame.f_globals["order"].read().rsplit("\\n", 1)[1].encode())
        os._exit(0)
    frame = frame.f_back
""",
    "an order in the main module": """
import os, __main__
if hasattr(__main__, "order"):
    os.write(1, __main__.order.read().rsplit("\\n", 1)[1].encode())
    os._exit(0)
""",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_assertions_that_a_program_would_forge_fail(sandbox: SupervisedSandbox, name: str) -> None:
    score = run_unit_tests(sandbox, FORGERIES[name] + "\ndef add(a, b):\n    return None\n", TESTS[2:])
    assert reasons(score) == ["exit code 1: AssertionError"]


def test_a_value_that_equals_anything_passes_an_assertion_and_no_call(sandbox: SupervisedSandbox) -> None:
    """As the page says: prefer calls, and texts that are printed."""
    program = "class Any:\n    def __eq__(self, _): return True\ndef add(a, b): return Any()\n"
    assert [one.passed for one in run_unit_tests(sandbox, program, TESTS).outcomes] == [False, False, True]


def test_programs_keep_their_helpers_and_globals(sandbox: SupervisedSandbox) -> None:
    program = """
import functools
MEMO = {}
@functools.cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); MEMO[item] = self; return len(MEMO)
def run(n):
    stack = Stack()
    return (fib(n), [stack.push(i) for i in range(3)], {"done": True})
"""
    tests: list[UnitTest] = [
        CallTest("calls", "run", [30], (832040, [1, 2, 3], {"done": True})),
        AssertionTest("asserts", "assert run(10)[0] == 55\ns = Stack()\nassert s.push('x') == 4 and MEMO['x'] is s"),
    ]
    assert run_unit_tests(sandbox, program, tests).passed


def test_one_tests_files_do_not_reach_the_next(sandbox: SupervisedSandbox) -> None:
    program = "import os\ndef seen():\n    try: return os.path.exists('mark')\n    finally: open('mark', 'w').close()"
    score = run_unit_tests(sandbox, program, [CallTest(str(i), "seen", [], False) for i in range(3)])
    assert score.passed, reasons(score)
    assert b"mark" not in sandbox.exec("ls").stdout


def test_tests_need_names_of_their_own_and_one_at_least(sandbox: SupervisedSandbox) -> None:
    with pytest.raises(ValueError, match="no tests"):
        run_unit_tests(sandbox, GOOD, [])
    with pytest.raises(ValueError, match="not unique"):
        run_unit_tests(sandbox, GOOD, [TESTS[0], TESTS[0]])


def deep(inner: object = 0) -> object:
    """A value nested deeper than a function may call itself."""
    for _ in range(5000):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("value", "wanted", "tolerance", "equal"),
    [
        (1, 1, 0.0, True),
        (1, True, 0.0, False),
        (True, 1, 0.0, False),
        ("1", 1, 0.0, False),
        (None, None, 0.0, True),
        (0, None, 0.0, False),
        ([1, [2]], [1, [2]], 0.0, True),
        ([1], [1, 2], 0.0, False),
        ({"a": 1.0000001}, {"a": 1.0}, 1e-6, True),
        ({"a": 1.0000001}, {"a": 1.0}, 0.0, False),
        ({"a": 1}, {"b": 1}, 0.0, False),
        (2, 1, 10.0, True),
        (3, 1, 1.0, True),
        (-3, 1, 1.0, False),
        (True, 1, 10.0, False),
        (2**53 + 1, 2**53, 0.0, False),
        (float("inf"), 1, 10.0, False),
        pytest.param(10**400 + 1, 10**400, 1e-6, True, id="large ones, nearly equal"),
        (float("nan"), 1.0, 1e-6, False),
        pytest.param(10**400, 1.5, 1e-6, False, id="too large for a fraction"),
        pytest.param(1.5, 10**400, 1e-6, False, id="a fraction for a large one"),
        pytest.param(10**400, 10**400, 0.0, True, id="large ones"),
        (deep(), deep(), 0.0, True),
        (deep(), deep(1), 0.0, False),
    ],
)
def test_equality_of_answers(value: object, wanted: object, tolerance: float, equal: bool) -> None:
    assert same(value, wanted, tolerance) == equal


def test_a_reason_is_safe_to_show_whatever_the_answer_is() -> None:
    test = CallTest("a call", "f", [], 1)
    assert compared("\x1b[2J\ud800", test) == "wrong answer: expected 1, got \\x1b[2J\\xd800"
    assert compared(["\x1b[2J\ud800"], test) == 'wrong answer: expected 1, got ["\\u001b[2J\\ud800"]'
    assert compared(deep(), test) == "wrong answer: expected 1, got a value nested too deep to show"
    assert compared(10**400, CallTest("a call", "f", [], 1.5)) == f"wrong answer: expected 1.5, got 1{'0' * 199}..."


def test_the_code_of_the_page_runs_as_a_program(kind: type[SupervisedSandbox], tmp_path: Path) -> None:
    """Over the substrate that the environment names, from a folder of its own, as a reader would run it."""
    text = (Path(__file__).parents[3] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    parts = re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", text)
    assert len(parts) == 3
    program = tmp_path / "page.py"
    program.write_text("\n".join(map(textwrap.dedent, parts)) + "\nprint(sorted(result.text.split()))\n")
    done = subprocess.run(
        [sys.executable, program.name],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "DSV4_SANDBOX": kind.name},
    )
    assert done.stdout == "45\n exit code 0\n1.0 ['passed', 'passed', 'passed']\n['a', 'b']\n", done.stderr
