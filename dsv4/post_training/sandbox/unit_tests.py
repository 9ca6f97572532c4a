"""A candidate program's score by unit tests, run in a sandbox: the reward of verifiable programming tasks.

Expected values of output and call tests never enter the sandbox; the comparison is outside, so that a program cannot
forge a pass. Assertions run beside the program, which could in principle look for their answer in its own process.
"""

import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.post_training.sandbox.interface import Sandbox, SandboxRefusal
from dsv4.post_training.sandbox.result import Result, escaped, printable

PROGRAM, DRIVER, ANSWER = "program.py", "driver.py", "answer.json"
SHOWN = 200  # characters of a value in a reason

CALL = """
import json, runpy, sys
order = json.load(sys.stdin)
found = runpy.run_path(order["program"], run_name="program")
value = found[order["function"]](*order["arguments"])
with open(order["answer"], "w") as file:
    json.dump(value, file)
"""
ASSERTIONS = """
import os, runpy, sys
order = os.fdopen(os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
write = os.write
found = runpy.run_path("program.py", run_name="program")
code, token = order.read().rsplit("\\n", 1)
exec(compile(code, "test", "exec"), found)
sys.stdout.flush()
write(1, token.encode())
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
    tolerance: float = 0.0  # relative and absolute, of numbers with a fraction


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
) -> Score:
    """Run a Python program against each test, with the same files at the start of each, and at the end.

    `timeout`: seconds per test; `total`: of all, past which no other test begins: those that are left fail.

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
    until = time.monotonic() + total
    for test in tests:
        if time.monotonic() < until:
            sandbox.restore(start)
            reason = _run(sandbox, test, timeout)
        else:
            reason = f"not run: the tests before it took {total:g} s"
        outcomes.append(TestOutcome(test.name, reason is None, reason or "passed"))
    sandbox.restore(before)  # the next program finds nothing of this one
    return Score(tuple(outcomes))


def _run(sandbox: Sandbox, test: UnitTest, timeout: float | None) -> str | None:
    """Reason why a test fails; None if it passes."""
    if isinstance(test, OutputTest):
        return _output(sandbox, test, timeout)
    if isinstance(test, CallTest):
        return _call(sandbox, test, timeout)
    return _assertions(sandbox, test, timeout)


def _output(sandbox: Sandbox, test: OutputTest, timeout: float | None) -> str | None:
    result = sandbox.exec([sandbox.python, PROGRAM], stdin=test.stdin.encode(), timeout=timeout)
    if not result.ok:
        return failure(result)
    if result.stdout_bytes > len(result.stdout):
        return result.describe()
    wanted, got = _lines(test.stdout), _lines(result.stdout.decode(errors="replace"))
    return None if got == wanted else f"wrong output: expected {shown(wanted)}, got {shown(got)}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _call(sandbox: Sandbox, test: CallTest, timeout: float | None) -> str | None:
    order = {"program": PROGRAM, "function": test.function, "arguments": list(test.arguments), "answer": ANSWER}
    sandbox.put(DRIVER, CALL.encode())
    result = sandbox.exec([sandbox.python, DRIVER], stdin=json.dumps(order).encode(), timeout=timeout)
    if not result.ok:
        return failure(result)
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
    if value == wanted or (isinstance(value, int) and isinstance(wanted, int)):
        return value == wanted
    try:
        return math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond all numbers with a fraction
        return False


def _assertions(sandbox: Sandbox, test: AssertionTest, timeout: float | None) -> str | None:
    token = secrets.token_hex(16)  # printed after the assertions: leaving early is no pass
    sandbox.put(DRIVER, ASSERTIONS.encode())
    result = sandbox.exec([sandbox.python, DRIVER], stdin=f"{test.code}\n{token}".encode(), timeout=timeout)
    if not result.ok:
        return failure(result)
    return None if result.stdout.endswith(token.encode()) else "the program ended before the assertions did"


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
