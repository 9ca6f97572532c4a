"""Programs in answers, scored by unit tests in sandboxes that stand ready."""

from __future__ import annotations

import atexit
import functools
import re
import threading
from collections.abc import Sequence

from dsv4.post_training.problems import Explained
from dsv4.post_training.sandbox.calls import run_calls
from dsv4.post_training.sandbox.interface import Sandbox, SandboxError
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.pool import Pool
from dsv4.post_training.sandbox.substrates import open_sandbox
from dsv4.post_training.sandbox.unit_tests import CallTest, Score, UnitTest, run_unit_tests

LONGEST = 20_000  # characters of a program
SECONDS = 5.0  # per test
LIMITS = Limits(  # the seconds: of all tests of one program
    wall_seconds=6 * SECONDS,
    processor_seconds=6 * SECONDS,
    memory_bytes=256 * MIB,
    processes=16,
    disk_bytes=16 * MIB,
)
_ONE_POOL = threading.Lock()
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def explain_program(answer: str, tests: Sequence[UnitTest], partial: bool = False) -> Explained:
    """Reward of an answer's program, and why: 1 if all tests pass, else 0; `partial`: the share of tests that pass.

    SandboxError where no sandbox can be kept.
    """
    program = program_of(answer)
    if not program.strip():
        return Explained(0.0, "no program")
    if len(program) > LONGEST:
        return Explained(0.0, f"a program of {len(program)} characters; allowed: {LONGEST}")
    score = scored(program, tests, sandboxes())
    reason = next((f"{one.name}: {one.reason}" for one in score.outcomes if not one.passed), "all tests pass")
    return Explained(score.fraction if partial else float(score.passed), reason)


def program_of(answer: str) -> str:
    """The first fenced block of an answer, or all of it."""
    found = _FENCE.search(answer)
    return found[1] if found else answer


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
    calls = [test for test in tests if isinstance(test, CallTest)]
    if len(calls) == len(tests):
        return run_calls(sandbox, program, calls, timeout=SECONDS)
    return run_unit_tests(sandbox, program, tests, timeout=SECONDS, total=LIMITS.wall_seconds)
