"""Logits to tokens: pure functions of one row's logits, its parameters, its seed and its output position.

Nothing here sees another row, so a request's tokens never depend on what runs beside it. The noise of a draw depends on
seed, position and token id alone: a draft model that samples with the same SampleRequest draws with the same noise, and
so agrees with the model as often as its logits allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4.engine.logits import LogitsProcessor, process_logits
from dsv4.engine.outputs import SampledToken
from dsv4.engine.sampling_params import SamplingParams
from dsv4.kernels.sampling import draw_token, kept_tokens, likeliest_token, pack_mask

_MASK64 = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-30  # of which no logit is an infinite multiple


@dataclass(slots=True)
class SampleRequest:
    """Inputs of the sampler for one row of logits: parameters, the request's seed, the number of its earlier tokens.

    `output_counts`: occurrences of each token in the output; for the processors (logits.py), None without any.
    `allowed`: a bit per token that may be drawn, uint32 [ceil(vocab / 32)], as grammar.py makes it; None: any may be.
    """

    params: SamplingParams
    seed: int
    position: int
    processors: tuple[LogitsProcessor, ...] = ()
    output_counts: Mapping[int, int] | None = None
    allowed: np.ndarray | None = None


def sample(logits: Tensor, requests: list[SampleRequest]) -> list[SampledToken]:
    """Samples one token per row. logits: fp32 [n, vocab], one request per row, any device."""
    if logits.shape[0] != len(requests):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(requests)} requests; allowed: one row per request")
    return [_sample_row(row, request) for row, request in zip(logits.float(), requests, strict=True)]


def verified(sampled: list[SampledToken], draft_token_ids: tuple[int, ...]) -> list[SampledToken]:
    """The tokens of one request's rows that stand: those after drafts that were sampled alike, and the next one.

    sampled[i] was sampled after the first i drafts, so that it stands where these are what was sampled.
    """
    for i, draft in enumerate(draft_token_ids):
        if sampled[i].token_id != draft:
            return sampled[: i + 1]
    return sampled


def _sample_row(logits: Tensor, request: SampleRequest) -> SampledToken:
    params, model_logits = request.params, logits
    if request.processors:
        logits = process_logits(logits, request.processors, request.output_counts or {})
    if params.temperature == 0.0:
        token_id = likeliest_token(logits, request.allowed)
    else:
        key = noise_key(request.seed, request.position)
        token_id = draw_token(
            logits, params.temperature, params.top_k, params.top_p, params.min_p, key, request.allowed
        )
    if not params.wants_logprobs:
        return SampledToken(token_id)
    logprobs, mask = _log_probabilities(model_logits, logits, request)
    return SampledToken(token_id, float(logprobs[token_id]), most_likely(logprobs, params.num_alternatives), mask)


def _log_probabilities(model_logits: Tensor, logits: Tensor, request: SampleRequest) -> tuple[Tensor, bytes | None]:
    """(log-probabilities [vocab] as logprobs_mode asks for them, mask of the tokens that can be drawn if it asks).

    model_logits: those before the processors; logits: those after them.
    """
    params = request.params
    processed = params.logprobs_mode == "processed_logprobs"
    row = logits if processed else model_logits
    if params.logprobs_mode != "raw_logprobs" and params.temperature != 1.0:
        row = _tempered(row, params.temperature)
    if not processed or not (params.truncates or request.allowed is not None):
        return row.log_softmax(dim=-1), None
    filters = params.temperature, params.top_k, params.top_p, params.min_p
    kept = kept_tokens(logits, *filters, request.allowed)
    return row.masked_fill(~kept, -torch.inf).log_softmax(dim=-1), pack_mask(kept)


def _tempered(row: Tensor, temperature: float) -> Tensor:
    """Logits [vocab] over a temperature; one so small that they would be infinite leaves the largest alone."""
    if temperature >= _LEAST_TEMPERATURE:
        return row / temperature
    return torch.zeros_like(row).masked_fill(row < row.max(), -torch.inf)


def most_likely(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of one row [vocab], likeliest first, the lower id first among equals."""
    if count == 0:
        return ()
    values, ids = logprobs.sort(descending=True, stable=True)
    return tuple((int(ids[i]), float(values[i])) for i in range(min(count, ids.shape[0])))


def noise_key(seed: int, position: int) -> int:
    """The key, in [0, 2^64), of the noise of the token at a position of the output: two rounds of SplitMix64."""
    return _mix(_mix(seed & _MASK64) ^ (position & _MASK64))


def output_seed(seed: int, index: int) -> int:
    """The seed of a prompt's output `index`; that of output 0 is `seed` itself."""
    return seed if index == 0 else _mix(_mix(seed & _MASK64) + index) >> 1


def _mix(x: int) -> int:
    """The first number of the SplitMix64 stream that begins at x (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
