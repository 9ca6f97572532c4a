"""Questions of mathematics_dataset (Saxton et al., 2019) whose worked steps stay small."""

from __future__ import annotations

import importlib
import random
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from dsv4.data.tasks.base import Draft, Example, Task
from dsv4.data.tasks.steps import operation_steps, subtract_steps

LARGEST = 99  # of a number that is divided or factored
PLACES = ("units", "tens", "hundreds", "thousands")
ENTROPY = (1, 3)  # about the digits of a question's numbers
_SUM = re.compile(r"(\d+) ([+-]) (\d+)")
_ONE_DRAW = threading.Lock()


class SchoolMathematics(Task):
    """Place values, remainders, divisibility, prime factors, sums: `What is the tens digit of 4281?`"""

    name = "school_mathematics"
    difficulty: ClassVar[dict[str, Any]] = {
        "modules": "place_value, div_remainder, is_factor, list_prime_factors, add_or_sub",
        "place_value": "up to 4 digits",
        "divided_up_to": LARGEST,
        "sums": "of integers with two digits",
    }

    def __init__(self) -> None:
        self._modules: Mapping[str, Callable[[], Any]] = {}

    def draft(self, rng: random.Random) -> Draft | None:
        """Draw a question of one of the modules; None unless its steps stay small."""
        if not self._modules:
            self._modules = load_modules()
        name = rng.choice(sorted(_STEPS))
        problem = reproducibly(self._modules[name], rng.getrandbits(32))
        question, answer = str(problem.question), str(problem.answer)
        lines = _STEPS[name](question, answer)
        return None if lines is None else Draft(_key(name, question), question, answer, "\n".join(lines))

    def score(self, example: Example, answer_text: str) -> float:
        """Compare the answer."""
        return float(answer_text.strip() == example.answer)


def load_modules() -> dict[str, Callable[[], Any]]:
    """The dataset's modules of numbers and sums, at ENTROPY."""
    # The dataset is of 2019; the one name of sympy's that it imports has moved since.
    moved = importlib.import_module("sympy.solvers.diophantine.diophantine")
    setattr(sys.modules["sympy.solvers.diophantine"], "base_solution_linear", moved.base_solution_linear)  # noqa: B010
    found: dict[str, Callable[[], Any]] = {}
    for name in ("numbers", "arithmetic"):
        module = importlib.import_module(f"mathematics_dataset.modules.{name}")
        found |= module.train(lambda _: ENTROPY)
    return found


def reproducibly(draw: Callable[[], Any], seed: int) -> Any:
    """Result of a draw from the global random generators at a seed; they are then as before.

    Threads that ask problems ahead draw at the same time, and share these generators: one after the other.
    """
    with _ONE_DRAW:
        state, numbers = random.getstate(), np.random.get_state()
        try:
            random.seed(seed)
            np.random.seed(seed)
            return draw()
        finally:
            random.setstate(state)
            np.random.set_state(numbers)


def _key(name: str, question: str) -> str:
    """Subject of a question, whatever its words: for a sum its expression, which chain_sum can ask too."""
    if match := _SUM.search(question):
        return " ".join(match.groups())
    place = _place(question) if name == "place_value" else ""
    return f"{name} {place} {sorted(map(int, re.findall(r'[0-9]+', question)))}"


def _place(question: str) -> str:
    return question.split(" digit ")[0].split()[-1]


def _integers(question: str) -> list[int] | None:
    """Numbers of a question; None if one is no integer from 0 on."""
    if re.search(r"-\d|\d\.\d|/", question):
        return None
    return [int(text) for text in re.findall(r"\d+", question)]


def _place_value(question: str, answer: str) -> list[str] | None:
    numbers = _integers(question)
    if numbers is None or len(numbers) != 1 or numbers[0] >= 10 ** len(PLACES):
        return None
    digits = reversed(str(numbers[0]))
    wanted = _place(question)
    lines = [f"{place} {digit}" for place, digit in zip(PLACES, digits, strict=False)]
    count = PLACES.index(wanted) + 1 if wanted in PLACES else 0
    return lines[:count] if 0 < count <= len(lines) and lines[count - 1] == f"{wanted} {answer}" else None


def _divide(number: int, divisor: int) -> list[str] | None:
    """Multiples of the divisor up to the number, and what is left."""
    if not (1 < divisor <= number <= LARGEST and number // divisor <= 12):
        return None
    multiples = [divisor * n for n in range(1, number // divisor + 1)]
    return [f"{divisor}: {' '.join(map(str, multiples))}", *subtract_steps(number, multiples[-1])]


def _remainder(question: str, answer: str) -> list[str] | None:
    numbers = _integers(question)
    if numbers is None or len(numbers) != 2 or numbers[0] % max(1, numbers[1]) != int(answer):
        return None
    return _divide(*numbers)


def _is_factor(question: str, answer: str) -> list[str] | None:
    numbers = _integers(question)
    if numbers is None or len(numbers) != 2:
        return None
    divisor, number = sorted(numbers)
    return _divide(number, divisor) if answer == str(divisor > 0 and number % divisor == 0) else None


def _prime_factors(question: str, answer: str) -> list[str] | None:
    numbers = _integers(question)
    if numbers is None or len(numbers) != 1 or not 1 < numbers[0] <= LARGEST:
        return None
    left, prime, lines = numbers[0], 2, list[str]()
    while left > 1:
        if left % prime:
            prime += 1
            continue
        lines.append(f"{left}/{prime}={left // prime}")
        left //= prime
    return lines


def _sum(question: str, answer: str) -> list[str] | None:
    numbers, match = _integers(question), _SUM.search(question)
    if numbers is None or match is None or len(numbers) != 2 or max(numbers) > LARGEST:
        return None
    lines = operation_steps(int(match[1]), match[2], int(match[3]))
    return lines if lines and lines[-1].endswith(f"={answer}") else None


_STEPS: dict[str, Callable[[str, str], list[str] | None]] = {
    "place_value": _place_value,
    "div_remainder": _remainder,
    "is_factor": _is_factor,
    "list_prime_factors": _prime_factors,
    "add_or_sub": _sum,
}
