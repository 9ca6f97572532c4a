"""Documents made on demand: worked examples of the tasks, and prose of the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from dsv4.data.packing import Document
from dsv4.data.sources import sample_document
from dsv4.data.stable_hash import stable_hash
from dsv4.data.tasks import TASKS
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import BOS, EOS

STDLIB = "stdlib"
LENGTH_SAMPLES = 24


class TaskDocuments:
    """Draws documents of the tasks and of STDLIB by their shares of the tokens.

    `whole_loss`: every token of a conversation is a target, else the assistant's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, shares: Mapping[str, float], whole_loss: bool) -> None:
        unknown = set(shares) - set(TASKS) - {STDLIB}
        if unknown:
            raise ValueError(f"mixture: unknown sources {sorted(unknown)}; tasks and {STDLIB!r} are allowed")
        self._tokenizer, self._whole_loss = tokenizer, whole_loss
        # Conversations are encoded with the later effort ladder, so that both effort instructions are trained.
        self._prompts = PromptEncoder(tokenizer, "0731")
        self._names = sorted(shares)
        # Shares count tokens, so sources with longer documents are drawn less often.
        self._weights = [shares[name] / self._mean_length(name) for name in self._names]

    def draw(self, random: Random) -> Document:
        """Draw one document."""
        name = random.choices(self._names, self._weights)[0]
        return self._document(name, random.getrandbits(48))

    def _document(self, name: str, seed: int) -> Document:
        if name == STDLIB:
            text = sample_document(Random(seed))
            special = self._tokenizer.special_id
            ids = [special(BOS), *self._tokenizer.encode(text), special(EOS)]
            return Document(tuple(ids), (1,) * len(ids))
        example = TASKS[name].sample(seed, "train")
        ids, mask = encode_training(self._prompts, example.prompt(), example.target(), example.letterwise)
        return Document(tuple(ids), (1,) * len(ids) if self._whole_loss else tuple(mask))

    def _mean_length(self, name: str) -> float:
        lengths = [len(self._document(name, stable_hash("length", n) >> 16)) for n in range(LENGTH_SAMPLES)]
        return sum(lengths) / LENGTH_SAMPLES
