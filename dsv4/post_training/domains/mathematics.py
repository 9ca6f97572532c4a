"""Mathematics: the verifiable tasks with longer numbers and more of them than the tasks themselves have.

A right number in another form counts where math-verify is there.

An expression that is left to the reader is no answer: "3+4*2" equals the answer of its own question. So another form
holds one number, nothing is computed with it, and no word or sign makes another value of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from random import Random
from typing import ClassVar

from deepseek_recipe import Conversation

from dsv4.data.tasks import TASKS, Example, GymTask, Task
from dsv4.data.tasks.arithmetic import BasicArithmetic, ChainSum, CountBits, Gcd, SimpleEquations
from dsv4.notices import warn_once
from dsv4.post_training.domains.domain import Domain, Level
from dsv4.post_training.problems import Explained

WIDER: dict[Level, dict[type[GymTask], dict[str, int]]] = {  # settings by level, where they are not the task's own
    "easy": {
        ChainSum: {"min_terms": 2, "max_terms": 4, "max_digits": 2},
        BasicArithmetic: {"min_terms": 3, "max_terms": 4, "max_digits": 2},
        SimpleEquations: {"max_value": 12},
        Gcd: {"max_value": 60},
        CountBits: {"min_n": 64, "max_n": 2047},
    },
    "standard": {
        ChainSum: {"min_terms": 3, "max_terms": 8, "max_digits": 5},
        BasicArithmetic: {"min_terms": 3, "max_terms": 8, "max_digits": 3},
        SimpleEquations: {"max_value": 199},
        Gcd: {"max_value": 1000},
        CountBits: {"min_n": 64, "max_n": 1_000_000},
    },
}
NUMBERS = (*(kind.name for kind in WIDER["easy"]), "school_mathematics")
LONGEST = 200  # characters of an answer in another form
NUMBER = re.compile(r"(?<!\w)-?\d+(?:\.\d+)?(?:/\d+)?(?![\w%])")
_OTHER = re.compile(  # beside the number: it is computed with, or another value is meant
    r"[-+*^!/(%\d≠½¼¾]|\\(?!boxed\b)\w+"
    r"|\b(?:minus|negative|not|never|cannot|plus|and a half|squared|cubed|percent"
    r"|(?:dozen|hundred|thousand|million|billion|trillion)s?)\b|n['’]t\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class MathProblem:
    """A question of a task, whose scorer is asked first."""

    task: str
    example: Example
    domain: str = "mathematics"

    @property
    def key(self) -> str:
        return self.example.key

    @property
    def thinking(self) -> bool:
        return self.example.thinking

    def prompt(self) -> Conversation:
        return self.example.prompt()

    def reward(self, answer: str) -> float:
        return self.explain(answer).value

    def explain(self, answer: str) -> Explained:
        """Reward of an answer, and who found it right."""
        if TASKS[self.task].score(self.example, answer) >= 1.0:
            return Explained(1.0, f"the scorer of {self.task}")
        if same_number(self.example.answer, answer):
            return Explained(1.0, "math-verify")
        return Explained(0.0, "another answer")


@dataclass(frozen=True)
class Mathematics(Domain):
    """Questions of `tasks`, each as often as the others. `thinking` None leaves the mode to the task."""

    name: ClassVar[str] = "mathematics"
    tasks: tuple[str, ...] = NUMBERS
    thinking: bool | None = None
    level: Level = "standard"

    def prepare(self) -> None:
        if find_spec("math_verify") is None:
            warn_once("math-verify is not installed (pip install math-verify): answers count in the task's form only")

    def draw(self, rng: Random) -> MathProblem | None:
        task = rng.choice(self.tasks)
        example = at_level(task, self.level).sample(rng.getrandbits(40), rng.choice(("train", "eval")))
        return MathProblem(task, example if self.thinking is None else example.with_thinking(self.thinking))


@functools.cache
def at_level(name: str, level: Level) -> Task:
    """The task of a name, with the settings of a level."""
    wider = {kind.name: kind(**settings) for kind, settings in WIDER[level].items()}
    return wider.get(name) or TASKS[name]


def same_number(wanted: str, answer: str) -> bool:
    """True if an answer's one number is the wanted one: `7.0`, `x = 7`, `\\boxed{7}`. False without math-verify.

    What negates, signs or multiplies it in words is another value, wherever in the answer it stands.
    """
    found = NUMBER.findall(answer)
    if not NUMBER.fullmatch(wanted.strip()) or len(answer) > LONGEST or len(found) != 1:
        return False
    if "/" in found[0] and "/" not in wanted:
        return False
    if _OTHER.search(answer.replace(found[0], "", 1)):
        return False
    verified = _verifier()
    return verified is not None and verified(wanted, answer)


@functools.cache
def _verifier() -> Callable[[str, str], bool] | None:
    """Comparison of two numbers by math-verify; None if it is not installed."""
    if find_spec("math_verify") is None:
        return None
    library = import_module("math_verify")
    return lambda wanted, answer: bool(library.verify(library.parse(wanted), library.parse(answer)))
