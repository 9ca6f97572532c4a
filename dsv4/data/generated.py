"""Documents made on demand: worked examples of the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from dsv4.data.packing import Document
from dsv4.data.stable_hash import stable_hash
from dsv4.data.tasks import TASKS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder

LENGTH_SAMPLES = 24
# Token shares of the tasks; the harder a task's steps, the larger its share.
TASK_SHARES = {
    "chain_sum": 9.0,
    "basic_arithmetic": 5.0,
    "simple_equations": 6.0,
    "gcd": 9.0,
    "count_bits": 8.0,
    "number_sorting": 10.0,
    "number_filtering": 7.0,
    "word_sequence_reversal": 6.0,
    "needle_haystack": 7.0,
    "letter_counting": 7.0,
    "spell_backward": 13.0,
    "spelling": 13.0,
    "school_mathematics": 7.0,
    "tool_call": 6.0,
    "json_extraction": 4.0,
    "conversation": 3.0,
    "open_questions": 14.0,
    "follow_up": 5.0,
}


class TaskDocuments:
    """Draws documents of the tasks by their shares of the tokens.

    `whole_loss`: every token of a conversation is a target, else the assistant's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, shares: Mapping[str, float], whole_loss: bool) -> None:
        unknown = set(shares) - set(TASKS)
        if unknown:
            raise ValueError(f"mixture: unknown tasks {sorted(unknown)}; allowed: {', '.join(sorted(TASKS))}")
        self._whole_loss = whole_loss
        # Conversations are encoded with the later effort ladder, so that both effort instructions are trained.
        self._prompts = PromptEncoder(tokenizer, "0731")
        self._names = sorted(shares)
        # Shares count tokens, so tasks with longer documents are drawn less often.
        self._weights = [shares[name] / self._mean_length(name) for name in self._names]

    def draw(self, random: Random) -> Document:
        """Draw one document."""
        name = random.choices(self._names, self._weights)[0]
        return self._document(name, random.getrandbits(48))

    def _document(self, name: str, seed: int) -> Document:
        example = TASKS[name].sample(seed, "train")
        ids, mask = encode_training(self._prompts, example.prompt(), example.target(), example.letterwise)
        return Document(tuple(ids), (1,) * len(ids) if self._whole_loss else tuple(mask))

    def _mean_length(self, name: str) -> float:
        lengths = [len(self._document(name, stable_hash("length", n) >> 16)) for n in range(LENGTH_SAMPLES)]
        return sum(lengths) / LENGTH_SAMPLES
