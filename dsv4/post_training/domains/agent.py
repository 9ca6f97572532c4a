"""Tools: goals that take several calls of local tools, checked at the end of an episode."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from deepseek_recipe import Conversation, UserMessage

from dsv4.data.tasks.words import CITIES, COLOURS, ITEMS
from dsv4.post_training.domains.domain import Domain
from dsv4.post_training.domains.tool_environment import SHELL, TOOLS, Goal, ShellEnvironment, ToolEnvironment
from dsv4.post_training.episodes.environment import Environment
from dsv4.post_training.sandbox.substrates import missing


@dataclass(frozen=True)
class ToolProblem:
    """A goal in words, and the state that an episode begins with. `shell`: in a sandbox."""

    question: str
    goal: Goal
    files: dict[str, str]
    keys: dict[str, str]
    domain: str
    shell: bool = False
    thinking: bool = False

    @property
    def key(self) -> str:
        return f"{self.domain} {self.question}"

    def prompt(self) -> Conversation:
        tools = [SHELL] if self.shell else list(TOOLS)
        return Conversation([UserMessage(self.question)], thinking_mode=self.thinking, tools=tools)

    def environment(self) -> Environment:
        return ShellEnvironment(self.goal, self.files) if self.shell else ToolEnvironment(
            self.goal, self.files, self.keys
        )  # fmt: skip

    def reward(self, answer: str) -> float:
        """Reward of an answer without any call."""
        return self.environment().outcome(answer).value


@dataclass(frozen=True)
class Tools(Domain):
    """Goals on files, keys and numbers."""

    name: ClassVar[str] = "tools"
    thinking: bool = False

    def draw(self, rng: Random) -> ToolProblem | None:
        first, second, third = rng.sample(ITEMS, 3)
        a, b = rng.randint(10, 999), rng.randint(10, 999)
        text = f"{rng.choice(COLOURS)} {rng.choice(CITIES)}"
        files, keys = {f"{first}.txt": text, f"{second}.txt": str(a)}, {first: str(b), third: text}
        question, goal = rng.choice(
            (
                (f"Set the key {second} to {a} * {b}.", Goal(keys={second: str(a * b)})),
                (f"Copy the file {first}.txt to {third}.txt.", Goal(files={f"{third}.txt": text})),
                (f"What is in the file {first}.txt? Answer with its text only.", Goal(answer=text)),
                (f"Write the value of the key {third} to the file {third}.txt.", Goal(files={f"{third}.txt": text})),
                (
                    f"Add the number in the file {second}.txt and the value of the key {first}. "
                    f"Set the key {second} to the sum, and answer with it.",
                    Goal(keys={second: str(a + b)}, answer=str(a + b)),
                ),
            )
        )
        return ToolProblem(question, goal, files, keys, self.name, thinking=self.thinking)


@dataclass(frozen=True)
class Terminal(Domain):
    """Goals for a shell in the sandbox."""

    name: ClassVar[str] = "terminal"
    thinking: bool = False

    def prepare(self) -> None:
        reason = missing("namespaces")
        if reason is not None:
            raise ValueError(f"domain terminal runs commands in a sandbox, and there is none here: {reason}")

    def draw(self, rng: Random) -> ToolProblem | None:
        first, second = rng.sample(ITEMS, 2)
        words = rng.choices(COLOURS, k=rng.randint(3, 9))
        files = {f"{first}.txt": "".join(f"{word}\n" for word in words)}
        listed = "\n".join(sorted(words))
        question, goal = rng.choice(
            (
                (f"Copy {first}.txt to {second}.txt.", Goal(files={f"{second}.txt": "\n".join(words)})),
                (f"Write the sorted lines of {first}.txt to {second}.txt.", Goal(files={f"{second}.txt": listed})),
                (
                    f"How often is the line {words[0]} in {first}.txt? Answer with the number only.",
                    Goal(answer=str(words.count(words[0]))),
                ),
            )
        )
        return ToolProblem(question, goal, files, {}, self.name, shell=True, thinking=self.thinking)
