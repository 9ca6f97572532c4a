"""Code: small functions to program in Python. The answer is a program; unit tests in a sandbox are its reward."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from deepseek_recipe import Conversation, UserMessage

from dsv4.post_training.domains.domain import Domain, Level
from dsv4.post_training.domains.programs import draw_program, of_numbers
from dsv4.post_training.problems import Explained
from dsv4.post_training.program_tests import explain_program
from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.sandbox.unit_tests import CallTest

TESTS = 5
NAMES = ("f", "solve", "compute", "answer", "run")


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
        """Reward of a program, and why; errors as of `explain_program`."""
        return explain_program(answer, self.tests, self.partial)


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
