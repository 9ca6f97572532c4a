"""Goals that a random policy reaches now and then, in episodes of several turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deepseek_recipe import Conversation, UserMessage

from dsv4.config import nano_path
from dsv4.engine import SamplingParams
from dsv4.post_training.domains.tool_environment import SHELL
from dsv4.post_training.problems import Explained
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.optim import MuonAdamW

from .small_policy import has_f, small_policy

PARAMS = SamplingParams(max_tokens=12)


class Counted:
    """A goal that the random policy reaches with a digit; what it did is in `log`."""

    domain, thinking = "counted", False

    def __init__(self, number: int, log: list[str], fails: bool = False) -> None:
        self.key, self.log, self.fails = str(number), log, fails

    def prompt(self) -> Conversation:
        return Conversation([UserMessage(f"Say {self.key}")], thinking_mode=False, tools=[SHELL])

    def reward(self, answer: str) -> float:
        raise AssertionError("an episode's environment gives its reward")

    def environment(self) -> Counted:
        self.log.append("open")
        return self

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if self.fails:
            raise OSError("the environment is lost")
        return f"result of {name}"

    def outcome(self, answer: str) -> Explained:
        return Explained(has_f(answer), "an f")

    def close(self) -> None:
        self.log.append("close")


def roomy_policy() -> tuple[ServedPolicy, MuonAdamW]:
    """The small policy with a context that the tools' descriptions fit in."""
    policy, optimizer = small_policy()
    return ServedPolicy(policy.model, nano_path(), max_num_seqs=16, max_model_len=640), optimizer


def stopping(vocab: int) -> SamplingParams:
    return replace(PARAMS, stop_token_ids=tuple(range(2, vocab, 4)))
