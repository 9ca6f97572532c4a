"""Tools: goals that take several calls of local tools, checked at the end of an episode."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from deepseek_recipe import Conversation, UserMessage

from dsv4.data.tasks.words import CITIES, COLOURS, ITEMS
from dsv4.post_training.domains.domain import Domain, Level
from dsv4.post_training.domains.tool_environment import SHELL, TOOLS, Goal, ShellEnvironment, ToolEnvironment
from dsv4.post_training.episodes.environment import Environment
from dsv4.post_training.sandbox.substrates import missing

DONE = "Done."


@dataclass(frozen=True)
class Step:
    """A call of a tool on the way to a goal, and the reason for it. `name` names the tool."""

    why: str
    name: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class ToolProblem:
    """A goal in words, and the state that an episode begins with. `shell`: in a sandbox.

    `steps`, then `answer`, reach the goal. `tools` names those that may be called; the shell's problems have one.
    """

    question: str
    goal: Goal
    files: dict[str, str]
    keys: dict[str, str]
    domain: str
    steps: tuple[Step, ...] = ()
    answer: str = DONE
    shell: bool = False
    thinking: bool = False
    tools: tuple[str, ...] = tuple(tool.name for tool in TOOLS)

    @property
    def key(self) -> str:
        return f"{self.domain} {self.question}"

    def prompt(self) -> Conversation:
        tools = [SHELL] if self.shell else [tool for tool in TOOLS if tool.name in self.tools]
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
    """Goals on files, keys and numbers. Easy: the prompt names only tools that the goal needs."""

    name: ClassVar[str] = "tools"
    thinking: bool = False
    level: Level = "standard"

    def draw(self, rng: Random) -> ToolProblem | None:
        first, second, third = rng.sample(ITEMS, 3)
        a, b = rng.randint(10, 999), rng.randint(10, 999)
        text = f"{rng.choice(COLOURS)} {rng.choice(CITIES)}"
        files, keys = {f"{first}.txt": text, f"{second}.txt": str(a)}, {first: str(b), third: text}
        read_first = Step(f"read {first}.txt", "read_file", {"name": f"{first}.txt"})
        write_third = Step(f"write {third}.txt", "write_file", {"name": f"{third}.txt", "text": text})
        question, goal, steps, answer = rng.choice(
            (
                (
                    f"Set the key {second} to {a} * {b}.",
                    Goal(keys={second: str(a * b)}),
                    (_calculated(f"{a} * {b}"), _set(second, str(a * b))),
                    DONE,
                ),
                (
                    f"Copy the file {first}.txt to {third}.txt.",
                    Goal(files={f"{third}.txt": text}),
                    (read_first, write_third),
                    DONE,
                ),
                (
                    f"What is in the file {first}.txt? Answer with its text only.",
                    Goal(answer=text),
                    (read_first,),
                    text,
                ),
                (
                    f"Write the value of the key {third} to the file {third}.txt.",
                    Goal(files={f"{third}.txt": text}),
                    (Step(f"get {third}", "get", {"key": third}), write_third),
                    DONE,
                ),
                (
                    f"Add the number in the file {second}.txt and the value of the key {first}. "
                    f"Set the key {second} to the sum, and answer with it.",
                    Goal(keys={second: str(a + b)}, answer=str(a + b)),
                    (
                        Step(f"read {second}.txt", "read_file", {"name": f"{second}.txt"}),
                        Step(f"get {first}", "get", {"key": first}),
                        _calculated(f"{a} + {b}"),
                        _set(second, str(a + b)),
                    ),
                    str(a + b),
                ),
            )
        )
        if self.level == "easy":
            used = tuple(tool.name for tool in TOOLS if tool.name in {step.name for step in steps})
            return ToolProblem(question, goal, files, keys, self.name, steps, answer, False, self.thinking, used)
        return ToolProblem(question, goal, files, keys, self.name, steps, answer, thinking=self.thinking)


def _calculated(expression: str) -> Step:
    return Step(f"calculate {expression}", "calculate", {"expression": expression})


def _set(key: str, value: str) -> Step:
    return Step(f"set {key} to {value}", "set", {"key": key, "value": value})


@dataclass(frozen=True)
class Terminal(Domain):
    """Goals for a shell in the sandbox; both levels are the same."""

    name: ClassVar[str] = "terminal"
    thinking: bool = False
    level: Level = "standard"

    def prepare(self) -> None:
        reason = missing()
        if reason is not None:
            raise ValueError(f"domain terminal runs commands in a sandbox, and there is none here: {reason}")

    def draw(self, rng: Random) -> ToolProblem | None:
        first, second = rng.sample(ITEMS, 2)
        words = rng.choices(COLOURS, k=rng.randint(3, 9))
        files = {f"{first}.txt": "".join(f"{word}\n" for word in words)}
        listed = "\n".join(sorted(words))
        source, target = f"{first}.txt", f"{second}.txt"
        question, goal, why, command, answer = rng.choice(
            (
                (
                    f"Copy {source} to {target}.",
                    Goal(files={target: "\n".join(words)}),
                    f"copy {source}",
                    f"cp {source} {target}",
                    DONE,
                ),
                (
                    f"Write the sorted lines of {source} to {target}.",
                    Goal(files={target: listed}),
                    f"sort {source}",
                    f"sort {source} > {target}",
                    DONE,
                ),
                (
                    f"How often is the line {words[0]} in {source}? Answer with the number only.",
                    Goal(answer=str(words.count(words[0]))),
                    f"count {words[0]}",
                    f"grep -cx {words[0]} {source}",
                    str(words.count(words[0])),
                ),
            )
        )
        steps = (Step(why, "run", {"command": command}),)
        return ToolProblem(question, goal, files, {}, self.name, steps, answer, shell=True, thinking=self.thinking)
