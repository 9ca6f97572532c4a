"""Training batches as a pure function of (seed, stage, step), so resuming needs the step only."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from dsv4.data.packing import Document, pack
from dsv4.data.sources import sample_document
from dsv4.data.tasks import TASKS
from dsv4.data.tasks.base import stable_hash
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.tokenizer.special import BOS, EOS

STDLIB = "stdlib"
# Token shares of the tasks; the harder a task's steps, the larger its share.
_TASK_SHARES = {
    "chain_sum": 10.0,
    "basic_arithmetic": 7.0,
    "simple_equations": 8.0,
    "gcd": 8.0,
    "count_bits": 8.0,
    "number_sorting": 8.0,
    "number_filtering": 6.0,
    "word_sequence_reversal": 6.0,
    "needle_haystack": 7.0,
    "letter_counting": 8.0,
    "spell_backward": 8.0,
    "tool_call": 8.0,
    "json_extraction": 4.0,
    "conversation": 3.0,
    "follow_up": 4.0,
}
MIXTURES: dict[str, dict[str, float]] = {
    "pretrain": _TASK_SHARES | {STDLIB: 20.0},
    "sft": _TASK_SHARES,
}
GROUP = 8  # rows packed together: enough that best fit wastes few tokens
LENGTH_SAMPLES = 24


@dataclass(frozen=True)
class TokenBatch:
    """One ragged row: token ids per document and loss masks of the same lengths, 1 for tokens that are targets."""

    documents: list[list[int]]
    loss_masks: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return sum(map(len, self.documents))


class NanoLoader:
    """Generates, encodes and packs examples on demand.

    `stage` "pretrain": standard library prose and conversations, loss on every token. `stage` "sft": conversations,
    loss on the assistant's tokens. `batch(step)` holds at most `tokens_per_batch` tokens. Steps are generated in groups
    of GROUP; the last group is cached, so that steps taken in order generate each example once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stage: str,
        seed: int,
        tokens_per_batch: int,
        mixture: dict[str, float] | None = None,
    ) -> None:
        if stage not in MIXTURES:
            raise ValueError(f"stage {stage!r}: one of {', '.join(MIXTURES)} is allowed")
        self._stage, self._seed, self._tokens = stage, seed, tokens_per_batch
        self._tokenizer = tokenizer
        # Conversations are encoded with the later effort ladder, so that both effort instructions are trained.
        self._prompts = PromptEncoder(tokenizer, "0731")
        shares = MIXTURES[stage] if mixture is None else mixture
        unknown = set(shares) - set(TASKS) - {STDLIB}
        if unknown:
            raise ValueError(f"mixture: unknown sources {sorted(unknown)}; tasks and {STDLIB!r} are allowed")
        self._names = sorted(shares)
        # Shares count tokens, so sources with longer documents are drawn less often.
        self._weights = [shares[name] / self._mean_length(name) for name in self._names]
        self._group: tuple[int, list[TokenBatch]] = (-1, [])

    def batch(self, step: int) -> TokenBatch:
        """Return the batch of a step, independent of earlier calls."""
        group, place = divmod(step, GROUP)
        if self._group[0] != group:
            rows = pack(self._documents(group), GROUP, self._tokens)
            batches = [
                TokenBatch([list(d.ids) for d in row.documents], [list(d.mask) for d in row.documents]) for row in rows
            ]
            self._group = (group, batches)
        return self._group[1][place]

    def _documents(self, group: int) -> Iterator[Document]:
        rng = Random(stable_hash("group", self._stage, self._seed, group))
        while True:
            name = rng.choices(self._names, self._weights)[0]
            yield self._document(name, rng.getrandbits(48))

    def _document(self, name: str, seed: int) -> Document:
        if name == STDLIB:
            text = sample_document(Random(seed))
            special = self._tokenizer.special_id
            ids = [special(BOS), *self._tokenizer.encode(text), special(EOS)]
            return Document(tuple(ids), (1,) * len(ids))
        example = TASKS[name].sample(seed, "train")
        ids, mask = encode_training(self._prompts, example.prompt(), example.target(), example.letterwise)
        return Document(tuple(ids), (1,) * len(ids) if self._stage == "pretrain" else tuple(mask))

    def _mean_length(self, name: str) -> float:
        lengths = [len(self._document(name, stable_hash("length", n) >> 16)) for n in range(LENGTH_SAMPLES)]
        return sum(lengths) / LENGTH_SAMPLES
