"""Changes to a row of logits before a token is drawn: bias and penalties.

Pure functions over one row: logits fp32 [vocab] in, a new row of the same shape out. The order, which
`make_processors` and `process_logits` keep: logit bias, presence and frequency penalties. The draw (sampler.py) then
applies the mask of allowed tokens, so that nothing brings a forbidden one back, temperature, top-k, top-p and min-p;
log-probabilities are those of the model, before all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# A row of logits and the occurrences of each token in the output -> a row of logits.
LogitsProcessor = Callable[[Tensor, Mapping[int, int]], Tensor]


def make_processors(
    bias: Mapping[int, float] | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> tuple[LogitsProcessor, ...]:
    """The processors of one request, in their order; those that change nothing are left out.

    bias: token id -> what is added to its logit.
    """
    processors: list[LogitsProcessor] = []
    if bias:
        processors.append(lambda logits, counts: add_bias(logits, bias))
    if presence_penalty or frequency_penalty:
        processors.append(
            lambda logits, counts: penalize_repetition(logits, counts, presence_penalty, frequency_penalty)
        )
    return tuple(processors)


def process_logits(logits: Tensor, processors: tuple[LogitsProcessor, ...], output_counts: Mapping[int, int]) -> Tensor:
    """The row after all processors, the first first."""
    for process in processors:
        logits = process(logits, output_counts)
    return logits


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Adds a number to the logits of some tokens. ValueError for a token id outside the vocabulary."""
    return logits.index_add(0, _token_ids(bias, logits), logits.new_tensor(list(bias.values())))


def penalize_repetition(
    logits: Tensor, output_counts: Mapping[int, int], presence_penalty: float, frequency_penalty: float
) -> Tensor:
    """Subtracts presence_penalty once, and frequency_penalty per occurrence, from tokens that were written already.

    As OpenAI's API defines both; the prompt's tokens do not count.
    """
    written = {token: count for token, count in output_counts.items() if count > 0}
    if not written:
        return logits
    penalties = [-presence_penalty - frequency_penalty * count for count in written.values()]
    return logits.index_add(0, _token_ids(written, logits), logits.new_tensor(penalties))


def _token_ids(chosen: Mapping[int, object], logits: Tensor) -> Tensor:
    """The mapping's token ids, int64 [n]."""
    wrong = next((token for token in chosen if not 0 <= token < logits.shape[0]), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong}; allowed: [0, {logits.shape[0] - 1}]")
    return torch.tensor(list(chosen), dtype=torch.int64, device=logits.device)
