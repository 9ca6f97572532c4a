"""Questions of the comparison of GRPO: prompts of several lengths, rewards that differ within every group."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from zlib import crc32

from deepseek_recipe import Conversation, UserMessage

EVEN = 10**6  # from this number on, all prompts have one length


def reward_of(text: str) -> float:
    """A number in [0, 1) that any change of the text changes, so that every group is trained on."""
    return crc32(text.encode()) / 2**32


@dataclass(frozen=True)
class Sum:
    """A sum to compute; what is rewarded is not the result."""

    number: int
    domain: str = "sums"
    thinking: bool = False

    @property
    def key(self) -> str:
        return str(self.number)

    def prompt(self) -> Conversation:
        random = Random(self.number)
        count = 12 if self.number >= EVEN else random.randint(4, 24)
        terms = ", ".join(str(random.randrange(100, 1000)) for _ in range(count))
        return Conversation([UserMessage(f"What is the sum of {terms}?")], thinking_mode=False)

    def reward(self, answer: str) -> float:
        return reward_of(answer)


class Sums:
    def problem(self, number: int, /) -> Sum:
        return Sum(number)
