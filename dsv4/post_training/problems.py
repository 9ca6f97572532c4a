"""Problems of reinforcement learning: a conversation that awaits an answer, and a reward of the answer's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Protocol, runtime_checkable

from deepseek_recipe import Conversation

from dsv4.data.stable_hash import stable_hash

END_OF_THINKING = "</think>"


class Problem(Protocol):
    """One prompt and the reward of its answers. Problems with the same `key` are the same problem."""

    @property
    def domain(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def thinking(self) -> bool: ...

    def prompt(self) -> Conversation: ...

    def reward(self, answer: str) -> float:
        """Reward of the text after the thinking, tool calls in their markup; 1.0 for a right answer, else 0.0."""
        ...


@dataclass(frozen=True)
class Explained:
    """A reward and the reason for it in words."""

    value: float
    reason: str


@runtime_checkable
class ExplainedProblem(Problem, Protocol):
    """A problem that says why an answer has its reward."""

    def explain(self, answer: str) -> Explained: ...


@runtime_checkable
class ParallelProblem(ExplainedProblem, Protocol):
    """A problem that may judge several answers at once, in threads: its judging waits for other processes."""

    @property
    def parallel(self) -> bool: ...


class ProblemSource(Protocol):
    """Problems by number: the same problem for the same number, so that a run resumes without a record of them."""

    def problem(self, number: int, /) -> Problem: ...


@dataclass(frozen=True)
class TaskProblem:
    """A question of a verifiable task (data/tasks)."""

    domain: str
    key: str
    example: object  # dsv4.data.tasks.Example

    @property
    def thinking(self) -> bool:
        return self.example.thinking  # pyright: ignore[reportAttributeAccessIssue]

    def prompt(self) -> Conversation:
        return self.example.prompt()  # pyright: ignore[reportAttributeAccessIssue]

    def reward(self, answer: str) -> float:
        from dsv4.data.tasks import TASKS  # needs the tasks' package

        return TASKS[self.domain].score(self.example, answer)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class TaskProblems:
    """Training questions of tasks, `weights` by name; `thinking_share` of them with thinking, None: as the tasks do."""

    weights: Mapping[str, float]
    seed: int = 1
    thinking_share: float | None = None
    _names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from dsv4.data.tasks import TASKS

        unknown = sorted(set(self.weights) - set(TASKS))
        if unknown or not self.weights:
            named = f"unknown tasks {', '.join(unknown)}" if unknown else "no tasks"
            raise ValueError(f"{named}; allowed: {', '.join(sorted(TASKS))}")
        wrong = {name: weight for name, weight in self.weights.items() if not weight > 0.0}
        if wrong:
            raise ValueError(f"weights of tasks {wrong}; allowed: more than 0")
        object.__setattr__(self, "_names", tuple(sorted(self.weights)))

    def problem(self, number: int, /) -> TaskProblem:
        from dsv4.data.tasks import TASKS

        rng = Random(stable_hash("problem", self.seed, number))
        name = rng.choices(self._names, [self.weights[name] for name in self._names])[0]
        example = TASKS[name].sample(rng.getrandbits(40))
        if self.thinking_share is not None:
            example = example.with_thinking(rng.random() < self.thinking_share)
        return TaskProblem(name, example.key, example)


def answer_of(text: str, thinking: bool) -> str | None:
    """Text after the thinking; None if the thinking never ends."""
    if not thinking:
        return text
    _, mark, answer = text.partition(END_OF_THINKING)
    return answer if mark else None
