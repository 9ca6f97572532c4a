"""Training batches as a pure function of (seed, stage, step), so resuming needs the step only."""

from collections.abc import Iterator
from random import Random

from dsv4.data.generated import STDLIB, TaskDocuments
from dsv4.data.packing import Document, TokenBatch, pack
from dsv4.data.stable_hash import stable_hash
from dsv4.tokenizer import Tokenizer

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
    "spelling": 6.0,
    "conversation": 3.0,
    "open_questions": 8.0,
    "follow_up": 4.0,
}
MIXTURES: dict[str, dict[str, float]] = {
    "pretrain": _TASK_SHARES | {STDLIB: 20.0},
    "sft": _TASK_SHARES,
}
GROUP = 8  # rows packed together: enough that best fit wastes few tokens


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
        self._source = TaskDocuments(tokenizer, MIXTURES[stage] if mixture is None else mixture, stage == "pretrain")
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
            yield self._source.draw(rng)
