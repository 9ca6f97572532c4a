"""Base classes: an Example (question, worked steps, answer), a pure function of (task, seed, split), and its Task."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, ClassVar, Literal

import reasoning_gym
from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    Message,
    SystemMessage,
    ToolCall,
    ToolDefinition,
    ToolMessage,
    UserMessage,
)

from dsv4.data.stable_hash import stable_hash
from dsv4.data.tasks.wordings import NO_OTHERS, Wordings

Split = Literal["train", "eval"]
Effort = Literal["low", "high", "max"]

EVAL_SHARE = 5  # one question in EVAL_SHARE belongs to the evaluation split
THINKING_SHARE = 2 / 3
HIGH_EFFORT_SHARE = 0.025
MAX_EFFORT_SHARE = 0.015
REWORDED_SHARE = 0.35  # of the training questions that have other wordings


def split_of(key: str) -> Split:
    """Assign a question to a split by its key, so that no evaluation question is ever a training question.

    The task plays no part: an expression that two tasks can ask is in the same split in both.
    """
    return "eval" if stable_hash("split", key) % EVAL_SHARE == 0 else "train"


@dataclass(frozen=True)
class Draft:
    """A candidate question before split and mode are decided; trivial variants have the same `key`."""

    key: str
    question: str
    answer: str
    reasoning: str
    entry: dict[str, Any] = field(default_factory=dict[str, Any])
    history: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    system: str = ""
    wordings: Wordings = NO_OTHERS


@dataclass(frozen=True)
class Example:
    """A conversation and the assistant turn that follows it.

    `messages` are dicts of role, content and, on assistant turns, reasoning and tool_calls ({id, name, arguments}).
    `reasoning` is the worked solution, used if `thinking` is True. `letterwise` answers are tokenized one character at
    a time.
    """

    task: str
    key: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    thinking: bool
    effort: Effort
    reasoning: str
    answer: str
    tool_calls: tuple[dict[str, Any], ...]
    entry: dict[str, Any]
    letterwise: bool = False

    @property
    def question(self) -> str:
        """Text of the last user or tool message."""
        return str(self.messages[-1]["content"])

    def with_thinking(self, thinking: bool) -> "Example":
        """Return the same question in the other mode."""
        return replace(self, thinking=thinking)

    def prompt(self) -> Conversation:
        """Build the conversation that asks for the assistant turn."""
        return Conversation(
            [_message(message, self.thinking) for message in self.messages],
            thinking_mode=self.thinking,
            tools=[ToolDefinition(t["name"], t.get("description"), t.get("parameters")) for t in self.tools],
            reasoning_effort=self.effort,
        )

    def target(self) -> AssistantMessage:
        """Build the assistant turn that is the training target."""
        reasoning = self.reasoning if self.thinking else None
        return AssistantMessage(self.answer, reasoning, _tool_calls(self.tool_calls))


def _tool_calls(calls: tuple[dict[str, Any], ...]) -> list[ToolCall] | None:
    return [ToolCall(c["id"], c["name"], json.dumps(c["arguments"])) for c in calls] or None


def _message(message: dict[str, Any], thinking: bool) -> Message:
    role, content = message["role"], message["content"]
    if role == "system":
        return SystemMessage(content)
    if role == "user":
        return UserMessage(content)
    if role == "tool":
        return ToolMessage(content, message["tool_call_id"])
    if role == "assistant":
        reasoning = message.get("reasoning") if thinking else None
        return AssistantMessage(content, reasoning, _tool_calls(tuple(message.get("tool_calls", ()))))
    raise ValueError(f"role {role!r} of a task message: one of system, user, assistant, tool is allowed")


class Task(ABC):
    """A family of questions with a scorer.

    `group` is "reasoning", "tools" or "talk"; `difficulty` lists every parameter of a question's difficulty.
    """

    name: str
    group: str = "reasoning"
    letterwise: bool = False
    reworded: ClassVar[bool] = False  # True if its questions have other wordings
    difficulty: ClassVar[dict[str, Any]]

    @abstractmethod
    def draft(self, rng: Random) -> Draft | None:
        """Draw one candidate question; None if it is outside the difficulty."""

    @abstractmethod
    def score(self, example: Example, answer_text: str) -> float:
        """Score the model's text after its thinking: 1.0 for a right answer, else 0.0."""

    def sample(self, seed: int, split: Split = "train", reworded: bool = False) -> Example:
        """Return the example that (task, seed, split) determines.

        `reworded`: in a wording that training never has; ValueError for a task without any. A share of the training
        questions has the wordings of training.
        """
        rng = Random(stable_hash(self.name, seed, split))
        for _ in range(10_000):
            draft = self.draft(rng)
            if draft is not None and split_of(draft.key) == split:
                break
        else:
            raise RuntimeError(f"task {self.name}: no question of split {split!r} in 10,000 draws for seed {seed}")
        mode, level = rng.random(), rng.random()
        effort: Effort = "low"
        if level < MAX_EFFORT_SHARE:
            effort = "max"
        elif level < MAX_EFFORT_SHARE + HIGH_EFFORT_SHARE:
            effort = "high"
        system = ({"role": "system", "content": draft.system},) if draft.system else ()
        question = self._worded(draft, seed, split, reworded)
        last = () if not question else ({"role": "user", "content": question},)
        return Example(
            task=self.name,
            key=draft.key,
            messages=(*system, *draft.history, *last),
            tools=draft.tools,
            thinking=mode < THINKING_SHARE,
            effort=effort,
            reasoning=draft.reasoning,
            answer=draft.answer,
            tool_calls=draft.tool_calls,
            entry=draft.entry,
            letterwise=self.letterwise,
        )

    def _worded(self, draft: Draft, seed: int, split: Split, reworded: bool) -> str:
        """The question in the task's own words, or in others."""
        rng = Random(stable_hash("wording", self.name, seed, split))
        if reworded:
            if not draft.wordings.held_out:
                raise ValueError(f"task {self.name} has no other wordings")
            return rng.choice(draft.wordings.held_out)
        if split == "train" and draft.wordings.train and rng.random() < REWORDED_SHARE:
            return rng.choice(draft.wordings.train)
        return draft.question


class GymTask(Task):
    """A task whose questions and scorer come from a reasoning-gym dataset (or one with its `score_answer`).

    `settings` are the dataset's at the task's `difficulty`; arguments replace some of them.
    """

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, **changed: Any) -> None:
        self._settings = self.settings | changed
        self._dataset: Any = None

    def make_dataset(self) -> Any:
        """Make the reasoning-gym dataset of this task's name; `entry` draws by random index."""
        return reasoning_gym.create_dataset(self.name, size=1, seed=0, **self._settings)

    @property
    def dataset(self) -> Any:
        """The dataset, made on first use since some read word lists."""
        if self._dataset is None:
            self._dataset = self.make_dataset()
        return self._dataset

    def entry(self, rng: Random) -> dict[str, Any]:
        """Draw one reasoning-gym entry: question, answer, metadata."""
        return self.dataset[rng.getrandbits(40)]

    def normalize(self, answer_text: str) -> str:
        """Convert an answer from the task's own short form to the form that the gym's scorer reads."""
        return answer_text.strip()

    def score(self, example: Example, answer_text: str) -> float:
        """Score with reasoning-gym's scorer; partial credit counts as 0.0."""
        score = self.dataset.score_answer(self.normalize(answer_text), example.entry)
        return 1.0 if score >= 1.0 else 0.0
