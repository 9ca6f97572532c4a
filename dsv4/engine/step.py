"""One step: chunks from the scheduler to the runner, its output to the sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dsv4.engine.request import Request
from dsv4.engine.sampler import SampleRequest
from dsv4.model.choices import ChoiceNotes


@dataclass(slots=True, eq=False)
class ScheduledChunk:
    """The next tokens of one request: positions start to stop, then drafts of those that follow.

    Drafts are there only where `stop` is the request's last token. A chunk that reaches it samples: a token after its
    last one, and one after each draft.
    """

    request: Request
    start: int
    stop: int
    draft_token_ids: tuple[int, ...] = ()
    num_tokens: int = field(init=False)  # rows of the batch
    num_samples: int = field(init=False)  # rows that yield a token, the last ones
    num_scored: int = field(init=False)  # rows that give log-probabilities of the prompt, the first ones

    def __post_init__(self) -> None:
        drafts = len(self.draft_token_ids)
        self.num_tokens = self.stop - self.start + drafts
        self.num_samples = 1 + drafts if self.stop == self.request.num_tokens else 0
        request, scored = self.request, 0
        if request.params.prompt_logprobs:  # the prompt's last token predicts none of the prompt's
            scored = min(self.stop, len(request.prompt_token_ids) - 1) - self.start
        self.num_scored = max(0, scored)

    def token_ids(self) -> list[int]:
        tokens = self.request.tokens(self.start, self.stop)
        return [*tokens, *self.draft_token_ids] if self.draft_token_ids else tokens

    def sample_requests(self) -> list[SampleRequest]:
        """Inputs of the sampler, one per row that yields a token."""
        if not self.num_samples:
            return []
        request, drafts = self.request, self.draft_token_ids
        rows = [sample_request(request, drafts[:i]) for i in range(self.num_samples)]
        if request.constraint is not None:
            for row, allowed in zip(rows, request.constraint.masks(drafts), strict=True):
                row.allowed = allowed
        return rows


def sample_request(request: Request, draft_token_ids: Sequence[int]) -> SampleRequest:
    """Inputs of the sampler for the token after drafts, without the constraint's mask."""
    row = SampleRequest(request.params, request.seed, len(request.output.token_ids) + len(draft_token_ids))
    if request.processors:
        row.processors = request.processors
        row.output_counts = request.output_counts + Counter(draft_token_ids)
    return row


@dataclass(slots=True)
class StepOutput:
    """Results of a step: for the rows that yield a token, chunk by chunk, and for those that score a prompt."""

    logits: Tensor  # fp32 [n, vocab]
    streams: Tensor | None = None  # [tokens of the batch, hc_mult, d], where the runner keeps them
    prompt_logits: Tensor | None = None  # fp32 [rows that score, vocab]; None where none do
    notes: ChoiceNotes | None = None  # of all tokens of the batch, where choices are recorded
