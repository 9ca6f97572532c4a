"""Problems asked with a reasoning effort."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_recipe import Conversation

from dsv4.data.tasks import Effort
from dsv4.post_training.episodes.environment import Environment, EpisodeProblem
from dsv4.post_training.problems import Explained, ExplainedProblem, Problem
from dsv4.tokenizer.prompts import with_messages


@dataclass(frozen=True)
class EffortProblem:
    """A problem that is asked with an effort; its rewards are the problem's."""

    inner: Problem
    effort: Effort

    @property
    def domain(self) -> str:
        return self.inner.domain

    @property
    def key(self) -> str:
        return self.inner.key

    @property
    def thinking(self) -> bool:
        return self.inner.thinking

    def prompt(self) -> Conversation:
        asked = self.inner.prompt()
        return with_messages(asked, asked.messages, reasoning_effort=self.effort)

    def reward(self, answer: str) -> float:
        return self.inner.reward(answer)

    def explain(self, answer: str) -> Explained:
        if isinstance(self.inner, ExplainedProblem):
            return self.inner.explain(answer)
        return Explained(self.inner.reward(answer), "")


@dataclass(frozen=True)
class EffortGoal(EffortProblem):
    """A goal of episodes that is asked with an effort."""

    def environment(self) -> Environment:
        assert isinstance(self.inner, EpisodeProblem)
        return self.inner.environment()


def with_effort(problem: Problem, effort: Effort) -> EffortProblem:
    """The problem, asked with an effort."""
    return EffortGoal(problem, effort) if isinstance(problem, EpisodeProblem) else EffortProblem(problem, effort)
