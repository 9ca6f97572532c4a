"""Logits to tokens: pure functions of one row's logits, its parameters, its seed and its output position.

Nothing here sees another row, so a request's tokens never depend on what runs beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.engine.sampling_params import SamplingParams
from dsv4.kernels.sampling import draw_token

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SampledToken:
    """One sampled token. `logprob` and `alternatives` are filled only when the request asked for them."""

    token_id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), likeliest first, ties by lower id


@dataclass(frozen=True)
class SampleRequest:
    """What a row of logits needs to become a token: parameters, the request's seed, how many tokens it has made."""

    params: SamplingParams
    seed: int
    position: int


def sample(logits: Tensor, requests: list[SampleRequest]) -> list[SampledToken]:
    """Samples one token a row. logits: fp32 [n, vocab], one request a row, any device."""
    if logits.shape[0] != len(requests):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(requests)} requests; one row a request is needed")
    return [_sample_row(row, request) for row, request in zip(logits.float(), requests, strict=True)]


def _sample_row(logits: Tensor, request: SampleRequest) -> SampledToken:
    params = request.params
    if params.temperature == 0.0:
        # Both give the first of equal maxima, the lower id. On the CPU NumPy's takes a twentieth of torch's time.
        token_id = int(logits.numpy().argmax() if logits.is_cpu else logits.argmax())
    else:
        u = uniform(request.seed, request.position)
        token_id = draw_token(logits, params.temperature, params.top_k, params.top_p, params.min_p, u)
    if not params.wants_logprobs:
        return SampledToken(token_id)
    logprobs = logits.log_softmax(dim=-1)
    return SampledToken(token_id, float(logprobs[token_id]), most_likely(logprobs, params.num_alternatives))


def most_likely(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of one row [vocab], likeliest first, the lower id first among equals."""
    if count == 0:
        return ()
    values, ids = logprobs.sort(descending=True, stable=True)
    return tuple((int(ids[i]), float(values[i])) for i in range(min(count, ids.shape[0])))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone, the same on every device and version.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014), the top 53 bits.
    """
    bits = _mix(_mix(seed & _MASK64) ^ (position & _MASK64))
    return (bits >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
