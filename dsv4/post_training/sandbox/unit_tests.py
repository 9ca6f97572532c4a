"""A candidate program's score by unit tests, run in a sandbox: the reward of verifiable programming tasks.

Expected values of output and call tests never enter the sandbox; the comparison is outside, so that a program cannot
forge a pass. Assertions run beside the program, in its process: it can make them pass by values that equal anything, or
by a search of its process for the token that ends them.
"""

import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dsv4.post_training.sandbox.interface import Sandbox, SandboxRefusal
from dsv4.post_training.sandbox.result import Result, escaped, printable

PROGRAM, DRIVER, ANSWER = "program.py", "driver.py", "answer.json"
SHOWN = 200  # characters of a value in a reason
TIMES = ("wall time", "processor time")  # limits whose reaching is a hang

CALL = """
import json, runpy, sys
order = json.load(sys.stdin)
found = runpy.run_path(order["program"], run_name="program")
value = found[order["function"]](*order["arguments"])
with open(order["answer"], "w") as file:
    json.dump(value, file)
"""
# What the program could replace is taken before it runs, and nothing is left in a descriptor or a global of the driver.
ASSERTIONS = """
import os, runpy

def run(exec, write):
    with os.fdopen(os.dup(0)) as order:
        code, token = order.read().rsplit("\\n", 1)
    test, out = compile(code, "test", "exec"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    found = runpy.run_path("program.py", run_name="program")
    exec(test, found)
    write(out, token.encode())

run(exec, os.write)
"""


@dataclass(frozen=True, slots=True)
class OutputTest:
    """The program, given `stdin`, prints `stdout`; space at the ends of lines and of the text is not compared."""

    name: str
    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class CallTest:
    """`function` of the program, called with JSON arguments, returns `expected` (tuples count as lists)."""

    name: str
    function: str
    arguments: Sequence[Any]
    expected: Any
    tolerance: float = 0.0  # relative and absolute, of all numbers


@dataclass(frozen=True, slots=True)
class AssertionTest:
    """Statements that run in the program's namespace after it and raise where it is wrong."""

    name: str
    code: str


UnitTest = OutputTest | CallTest | AssertionTest


@dataclass(frozen=True, slots=True)
class TestOutcome:
    __test__ = False  # not a class of tests

    name: str
    passed: bool
    reason: str
    known: bool = True  # False: time for all tests ran out before this one, which says nothing of the program


@dataclass(frozen=True, slots=True)
class Score:
    outcomes: tuple[TestOutcome, ...]

    @property
    def fraction(self) -> float:
        return sum(outcome.passed for outcome in self.outcomes) / len(self.outcomes)

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)


def run_unit_tests(
    sandbox: Sandbox,
    program: str,
    tests: Sequence[UnitTest],
    *,
    timeout: float | None = None,
    total: float = math.inf,
    hangs: float = math.inf,
) -> Score:
    """Run a Python program against each test, with the same files at the start of each, and at the end.

    `timeout`: seconds per test; `total`: of all, past which no other test begins: those that are left are not `known`.
    `hangs`: tests that may reach a limit of time; those that are left then fail.

    A program that fails, hangs or misbehaves fails its tests with the reason. SandboxError where the sandbox is lost.
    """
    if not tests:
        raise ValueError("no tests: a program without tests has no score")
    names = [test.name for test in tests]
    if len({*names}) < len(names):
        raise ValueError(f"names of tests are not unique: {names}")
    before = sandbox.snapshot()
    sandbox.put(PROGRAM, program.encode(errors="backslashreplace"))
    start = sandbox.snapshot()
    outcomes: list[TestOutcome] = []
    until, hung = time.monotonic() + total, 0
    for test in tests:
        if hung >= hangs:
            outcomes.append(after_hangs(test, hung))
        elif time.monotonic() >= until:
            outcomes.append(out_of_time(test, total))
        else:
            sandbox.restore(start)
            result, token = _run(sandbox, test, timeout)
            hung += result.killed_by in TIMES
            reason = _reason(sandbox, test, result, token) if result.ok else failure(result)
            outcomes.append(TestOutcome(test.name, reason is None, reason or "passed"))
    sandbox.restore(before)  # the next program finds nothing of this one
    return Score(tuple(outcomes))


def after_hangs(test: UnitTest, hung: int) -> TestOutcome:
    """Outcome of a test that is not run since `hung` others of the program hung: it fails."""
    return TestOutcome(test.name, False, f"not run: {hung} tests before it ran out of time")


def out_of_time(test: UnitTest, total: float) -> TestOutcome:
    """Outcome of a test for which no time is left of all tests' `total` seconds: it is not known."""
    return TestOutcome(test.name, False, f"not run: the tests before it took {total:g} s", known=False)


def _run(sandbox: Sandbox, test: UnitTest, timeout: float | None) -> tuple[Result, str]:
    """Result of a test's command, and the token that assertions print at their end: leaving early is no pass."""
    token, script = secrets.token_hex(16), DRIVER
    if isinstance(test, OutputTest):
        script, stdin = PROGRAM, test.stdin
    elif isinstance(test, CallTest):
        order = {"program": PROGRAM, "function": test.function, "arguments": list(test.arguments), "answer": ANSWER}
        sandbox.put(DRIVER, CALL.encode())
        stdin = json.dumps(order)
    else:
        sandbox.put(DRIVER, ASSERTIONS.encode())
        stdin = f"{test.code}\n{token}"
    return sandbox.exec([sandbox.python, script], stdin=stdin.encode(), timeout=timeout), token


def _reason(sandbox: Sandbox, test: UnitTest, result: Result, token: str) -> str | None:
    """Reason why a test fails whose command ended well; None if it passes."""
    if isinstance(test, OutputTest):
        return _printed(test, result)
    if isinstance(test, CallTest):
        return _returned(sandbox, test)
    return None if result.stdout == token.encode() else "the program ended before the assertions did"


def _printed(test: OutputTest, result: Result) -> str | None:
    if result.stdout_bytes > len(result.stdout):
        return result.describe()
    wanted, got = _lines(test.stdout), _lines(result.stdout.decode(errors="replace"))
    return None if got == wanted else f"wrong output: expected {shown(wanted)}, got {shown(got)}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _returned(sandbox: Sandbox, test: CallTest) -> str | None:
    try:
        value = json.loads(sandbox.get(ANSWER, limit=sandbox.limits.output_bytes))
    except (SandboxRefusal, ValueError, RecursionError) as error:
        return f"no answer: {error}"
    return compared(value, test)


def compared(value: Any, test: CallTest) -> str | None:
    """Reason why a call's JSON value is not the expected one; None if it is."""
    wanted = json.loads(json.dumps(test.expected))
    if same(value, wanted, test.tolerance):
        return None
    return f"wrong answer: expected {shown(wanted)}, got {shown(value)}"


def same(value: Any, wanted: Any, tolerance: float) -> bool:
    """Equality of JSON values, however deep; true and 1 differ, as do 1 and "1"."""
    pending = [(value, wanted)]
    while pending:
        value, wanted = pending.pop()
        if isinstance(wanted, list):
            if not isinstance(value, list) or len(value) != len(wanted):
                return False
            pending += zip(value, wanted, strict=True)
        elif isinstance(wanted, dict):
            if not isinstance(value, dict) or value.keys() != wanted.keys():
                return False
            pending += ((value[key], wanted[key]) for key in wanted)
        elif not _same_scalar(value, wanted, tolerance):
            return False
    return True


def _same_scalar(value: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, bool) or isinstance(value, bool) or wanted is None or isinstance(wanted, str):
        return type(value) is type(wanted) and value == wanted
    if not isinstance(value, int | float):
        return False
    if value == wanted or not tolerance:
        return value == wanted
    if any(isinstance(one, float) and not math.isfinite(one) for one in (value, wanted)):
        return False
    found, right = Fraction(value), Fraction(wanted)  # whole numbers may be beyond all numbers with a fraction
    return abs(found - right) <= Fraction(tolerance) * max(1, abs(found), abs(right))


def failure(result: Result) -> str:
    """Failure of a command, and the last line that it wrote to standard error."""
    lines = printable(result.stderr).strip().splitlines()
    return result.describe() + (f": {shown(lines[-1])}" if lines else "")


def shown(value: Any) -> str:
    """A value in a reason, safe to show, cut if it is long."""
    try:
        text = escaped(value) if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        return "a value nested too deep to show"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
