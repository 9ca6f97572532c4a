"""Code: small functions to program in Python. The answer is a program; unit tests in a sandbox are its reward."""

from __future__ import annotations

import atexit
import functools
import re
import threading
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from deepseek_recipe import Conversation, UserMessage

from dsv4.post_training.domains.domain import Domain, Level
from dsv4.post_training.domains.programs import draw_program, of_numbers
from dsv4.post_training.problems import Explained
from dsv4.post_training.sandbox.calls import run_calls
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.limits import MIB, Limits
from dsv4.post_training.sandbox.pool import Pool
from dsv4.post_training.sandbox.substrates import missing, open_sandbox
from dsv4.post_training.sandbox.unit_tests import CallTest, Score

TESTS = 5
LONGEST = 20_000  # characters of a program
SECONDS = 5.0  # per test
LIMITS = Limits(
    wall_seconds=(TESTS + 1) * SECONDS,
    processor_seconds=(TESTS + 1) * SECONDS,
    memory_bytes=256 * MIB,
    processes=16,
    disk_bytes=16 * MIB,
)
NAMES = ("f", "solve", "compute", "answer", "run")
_ONE_POOL = threading.Lock()
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class CodeProblem:
    """A function to program. `partial`: the reward is the share of tests that pass; else 1 for all, 0 otherwise."""

    key: str
    question: str
    solution: str  # the reference implementation
    reasoning: str
    tests: tuple[CallTest, ...]
    partial: bool = False
    thinking: bool = False
    domain: str = "code"
    parallel: ClassVar[bool] = True

    def prompt(self) -> Conversation:
        return Conversation([UserMessage(self.question)], thinking_mode=self.thinking)

    def reward(self, answer: str) -> float:
        return self.explain(answer).value

    def explain(self, answer: str) -> Explained:
        """Reward of a program, and why. SandboxError where no sandbox can be kept."""
        program = program_of(answer)
        if not program.strip():
            return Explained(0.0, "no program")
        if len(program) > LONGEST:
            return Explained(0.0, f"a program of {len(program)} characters; allowed: {LONGEST}")
        score = scored(program, self.tests, sandboxes())
        reason = next((f"{one.name}: {one.reason}" for one in score.outcomes if not one.passed), "all tests pass")
        return Explained(score.fraction if self.partial else float(score.passed), reason)


@dataclass(frozen=True)
class Code(Domain):
    """Functions of numbers, lists and texts, of one expression each. Easy: of numbers alone."""

    name: ClassVar[str] = "code"
    partial: bool = False
    thinking: bool = False
    level: Level = "standard"

    def prepare(self) -> None:
        reason = missing()
        if reason is not None:
            raise ValueError(f"domain code runs answers in a sandbox, and there is none here: {reason}")

    def draw(self, rng: Random) -> CodeProblem | None:
        program = of_numbers(rng) if self.level == "easy" else draw_program(rng)
        name = rng.choice(NAMES)
        inputs = Random(program.expression)
        shown, *hidden = (program.inputs(inputs) for _ in range(TESTS + 1))
        values = [program.value(one) for one in hidden]
        if all(value == values[0] for value in values) or values == [one[0] for one in hidden]:
            return None  # a constant, or the argument itself, would pass
        signature = f"{name}({', '.join(program.arguments)})"
        question = (
            f"Write a Python function {signature} that returns {program.words}.\n"
            f"Example: {name}({', '.join(map(repr, shown))}) returns {program.value(shown)!r}"
        )
        tests = tuple(
            CallTest(f"test {place}", name, one, value)
            for place, (one, value) in enumerate(zip(hidden, values, strict=True), 1)
        )
        solution = f"def {signature}:\n    return {program.expression}\n"
        reasoning = f"{program.words}: {program.expression}"
        return CodeProblem(
            f"code {program.behavior}", question, solution, reasoning, tests, self.partial, self.thinking
        )


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


def scored(program: str, tests: tuple[CallTest, ...], pool: Pool, again: int = 1) -> Score:
    """Score of a program in a sandbox of its own; a sandbox that is lost is replaced `again` times."""
    for left in range(again, -1, -1):
        try:
            with pool.take() as sandbox:
                return run_calls(sandbox, program, tests, timeout=SECONDS)
        except SandboxError:
            if not left:
                raise
    raise AssertionError("unreachable")
