"""Programs in answers, scored by unit tests in sandboxes that stand ready."""

from __future__ import annotations

import atexit
import functools
import re
import threading
import time
from collections.abc import Iterator, Sequence

from dsv4.post_training.problems import Explained
from dsv4.post_training.sandbox.calls import run_calls
from dsv4.post_training.sandbox.interface import Sandbox, SandboxError
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.pool import Pool
from dsv4.post_training.sandbox.substrates import open_sandbox
from dsv4.post_training.sandbox.unit_tests import CallTest, Score, TestOutcome, UnitTest, run_unit_tests

LONGEST = 20_000  # characters of a program
SECONDS = 5.0  # per test
HANGS = 6  # tests of a program that may hang; the rest then fail
TOTAL = 150.0  # seconds of all tests of a program; one that needs more has no reward
LIMITS = Limits(  # of one command, which is a test that runs alone, or many calls
    wall_seconds=6 * SECONDS,
    processor_seconds=6 * SECONDS,
    memory_bytes=256 * MIB,
    processes=16,
    disk_bytes=16 * MIB,
)
_ONE_POOL = threading.Lock()
PYTHON = ("python", "python3", "py", "")  # languages of a fence, in lower case
_FENCE = re.compile(r"^ {0,3}(`{3,})[ \t]*([^\s`]*)[^`]*$")
_LATE_FENCE = re.compile(r"^[^`]*(`{3,})[ \t]*(python3?|py)[ \t]*$", re.IGNORECASE)  # behind other text of its line


def explain_program(answer: str, tests: Sequence[UnitTest], partial: bool = False) -> Explained:
    """Reward of an answer's program, and why: 1 if all tests pass, else 0; `partial`: the share of tests that pass.

    SandboxError where no sandbox can be kept, TimeoutError where the seconds of all tests end before they decide.
    """
    program = program_of(answer)
    if not program.strip():
        return Explained(0.0, "no program")
    if len(program) > LONGEST:
        return Explained(0.0, f"a program of {len(program)} characters; allowed: {LONGEST}")
    score = scored(program, tests, sandboxes())
    unknown = sum(not one.known for one in score.outcomes)
    if unknown and (partial or all(one.passed for one in score.outcomes if one.known)):
        raise TimeoutError(f"{unknown} of {len(tests)} tests were not run: those before them took {TOTAL:g} s")
    failed = (f"{one.name}: {one.reason}" for one in score.outcomes if one.known and not one.passed)
    reason = next(failed, "all tests pass")
    return Explained(score.fraction if partial else float(score.passed), reason)


def program_of(answer: str) -> str:
    """The first fenced block of an answer that is in Python or names no language, or all of the answer.

    A fence is a line of its own; one that names Python may end a line. One that names a language begins a block, also
    where one is open; the end of the text ends one.
    """
    ticks, language, block = 0, "", list[str]()  # of the open block; 0: none is open
    for line in answer.splitlines(keepends=True):
        found = _FENCE.match(line) or (None if ticks else _LATE_FENCE.match(line))
        if found is None or len(found[1]) < ticks:
            block.append(line)
            continue
        if ticks and language in PYTHON:
            break
        opens = not ticks or found[2]
        ticks, language, block = len(found[1]) if opens else 0, found[2].lower(), []
    return "".join(block) if ticks and language in PYTHON else answer


def sandboxes() -> Pool:
    """Sandboxes that stand ready for this process's rewards, closed at its end."""
    with _ONE_POOL:  # rewards come from several threads
        return _pool()


@functools.cache
def _pool() -> Pool:
    pool = Pool(functools.partial(open_sandbox, limits=LIMITS))
    atexit.register(pool.close)
    return pool


def scored(program: str, tests: Sequence[UnitTest], pool: Pool, again: int = 1) -> Score:
    """Score of a program in a sandbox of its own; a sandbox that is lost is replaced `again` times."""
    for left in range(again, -1, -1):
        try:
            with pool.take() as sandbox:
                return _run(sandbox, program, tests)
        except SandboxError:
            if not left:
                raise
    raise AssertionError("unreachable")


def _run(sandbox: Sandbox, program: str, tests: Sequence[UnitTest]) -> Score:
    """Score in the order of the tests: calls share commands, the others run alone."""
    until = time.monotonic() + TOTAL
    calls = [test for test in tests if isinstance(test, CallTest)]
    others = [test for test in tests if not isinstance(test, CallTest)]
    outcomes: dict[bool, Iterator[TestOutcome]] = {}
    if calls:
        score = run_calls(sandbox, program, calls, timeout=SECONDS, total=TOTAL, hangs=HANGS)
        outcomes[True] = iter(score.outcomes)
    if others:
        left = until - time.monotonic()
        score = run_unit_tests(sandbox, program, others, timeout=SECONDS, total=left, hangs=HANGS)
        outcomes[False] = iter(score.outcomes)
    return Score(tuple(next(outcomes[isinstance(test, CallTest)]) for test in tests))
