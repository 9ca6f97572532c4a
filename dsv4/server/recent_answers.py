"""RecentAnswers: tokens of the last answers, for the inspector. In memory, within bounds; the oldest go first."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv4.engine.outputs import TokenEvent

MAX_ANSWERS = 256
MAX_TOKENS = 1 << 21  # of all answers and their prompts together, 4 bytes each


@dataclass
class RecentAnswer:
    """Token ids of a prompt and of what was written after it so far."""

    model: str  # the served model's own name
    key: str  # API key of the request: nobody else may look
    prompt: array[int]
    answer: array[int] = field(default_factory=lambda: array("i"))
    cached_tokens: int = 0  # of the prompt, taken from stored prefixes
    num_draft_tokens: int = 0  # that were verified for it
    accepted: list[int] = field(default_factory=list[int])  # places in the answer of tokens that were drafted

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.answer)

    def extend(self, event: TokenEvent) -> None:
        """Adds a step's tokens: accepted drafts, and after them the model's next one."""
        first = len(self.answer)
        self.accepted += range(first, first + event.num_accepted_tokens)
        self.answer.extend(event.token_ids)
        self.cached_tokens = event.cached_tokens
        if event.timings is not None:
            self.num_draft_tokens = event.timings.num_draft_tokens

    def shorten(self, num_tokens: int) -> None:
        """Drops the tokens behind the end of an answer of this many."""
        del self.answer[num_tokens:]
        self.accepted = [place for place in self.accepted if place < num_tokens]


class RecentAnswers:
    """Answers by id. Safe from any thread."""

    def __init__(self, max_answers: int = MAX_ANSWERS, max_tokens: int = MAX_TOKENS) -> None:
        self._max_answers, self._max_tokens = max_answers, max_tokens
        self._answers: OrderedDict[str, RecentAnswer] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, answer_id: str, model: str, key: str, prompt: Sequence[int]) -> RecentAnswer:
        """A new answer, which is kept while it fits beside newer ones."""
        answer = RecentAnswer(model, key, array("i", prompt))
        with self._lock:
            self._answers[answer_id] = answer
            tokens = sum(kept.num_tokens for kept in self._answers.values())
            while self._answers and (len(self._answers) > self._max_answers or tokens > self._max_tokens):
                tokens -= self._answers.popitem(last=False)[1].num_tokens
        return answer

    def find(self, answer_id: str, key: str) -> RecentAnswer | None:
        """The answer, if it is kept and was given to this API key."""
        with self._lock:
            answer = self._answers.get(answer_id)
        return answer if answer is not None and answer.key == key else None
