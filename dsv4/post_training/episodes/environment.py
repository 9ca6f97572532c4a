"""Interface of environments: tools that an episode's turns call, and a goal that is checked at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dsv4.post_training.problems import Explained, Problem


class Environment(Protocol):
    """State of one episode."""

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Result of a tool as text; what the caller did wrong is a text, too. It raises if the environment is lost."""
        ...

    def outcome(self, answer: str) -> Explained:
        """Reward of the state and of the last turn's text after its thinking; asked once, at the end."""
        ...

    def close(self) -> None:
        """Give back what the environment holds."""
        ...


@runtime_checkable
class LoggedEnvironment(Environment, Protocol):
    """An environment with a log: calls of an episode that was cut off are answered from it, and not made again."""

    def log_to(self, path: Path) -> None:
        """Log to a file, and go on from what is in it. Called before all else; the file is of this episode alone."""
        ...

    def finish(self) -> None:
        """Keep of the log what answers the same calls: the episode is over, and no other call comes."""
        ...


@runtime_checkable
class EpisodeProblem(Problem, Protocol):
    """A goal. Its prompt names the tools; each episode gets an environment of its own."""

    def environment(self) -> Environment: ...


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """Ends of an episode besides the model's context."""

    turns: int = 8  # of the assistant
    tokens: int = 8192  # that are sampled
    calls: int = 8  # per turn; further ones are refused
    result: int = 4000  # characters of a tool's result; the rest is cut
    at_once: int = 64  # episodes in progress

    def __post_init__(self) -> None:
        for name in ("turns", "tokens", "calls", "result", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of episodes is {getattr(self, name)}; allowed: 1 or more")
