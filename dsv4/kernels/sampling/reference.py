"""Sampling in torch: the same bits on every device, since each step rounds once, as IEEE 754 has it.

A step is one torch operation, so that none is fused with the next, and no sum of floats is taken.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_INF = float("inf")
_LEAST_TEMPERATURE = 1e-200  # no logit divided by it is infinite
_MASS = 2.0**35  # units of probability mass per weight of 1
_LOG_EVEN = (3.999999999940941908e-01, 2.222219843214978396e-01, 1.531383769920937332e-01)
_LOG_ODD = (6.666666666666735130e-01, 2.857142874366239149e-01, 1.818357216161805012e-01, 1.479819860511658591e-01)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def draw_token(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    key: int,
    allowed: np.ndarray | None = None,
) -> int:
    """Sample a token id from logits [vocab] with the noise of `key`; see the contract in __init__.py."""
    if allowed is not None:
        logits = mask_tokens(logits, allowed)
    if logits.max() == -_INF:
        return likeliest_token(logits, allowed)
    divisor = _number(max(temperature, _LEAST_TEMPERATURE), logits, torch.float64)
    sums = logits.double() / divisor + gumbel_noise(key, logits.shape[0], logits.device)
    keep = kept_tokens(logits, temperature, top_k, top_p, min_p)
    return int(sums.where(keep & (logits > -_INF), -_INF).argmax())


def likeliest_token(logits: Tensor, allowed: np.ndarray | None = None) -> int:
    """The largest logit that is allowed, the lower id among equals."""
    if allowed is None:
        return int(logits.argmax())
    masked = mask_tokens(logits, allowed)
    return int(((masked == masked.max()) & _unpacked(logits, allowed)).byte().argmax())


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Tokens that the filters keep, bool [vocab]."""
    weight = weights(logits, temperature)
    keep = (weight.double() >= min_p) | (logits == logits.max())
    if (top_k and top_k < logits.shape[0]) or top_p < 1.0:
        order = logits.sort(descending=True, stable=True).indices
        prefix = torch.ones_like(keep)
        if top_k:
            prefix[top_k:] = False
        if top_p < 1.0:
            mass = (weight[order].double() * _MASS).round().long().where(prefix, 0)
            before = (mass.cumsum(dim=-1) - mass).double()
            prefix &= before < mass.sum().double() * top_p
            prefix[0] = True
        keep = keep & torch.zeros_like(keep).scatter_(0, order, prefix)
    return keep


def weights(logits: Tensor, temperature: float) -> Tensor:
    """e^((logit - largest) / temperature), at least e^-60, in fp32 to 4 units in the last place."""
    divisor = _number(min(max(temperature, 1e-37), 1e37), logits, torch.float32)
    x = ((logits - logits.max()) / divisor).clamp(min=-60.0)
    n = (x * 1.44269504).round()
    r = x - n * 0.693359375 - n * -2.12194440e-4
    p = torch.full_like(r, 1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + coefficient
    return p * ((n.int() + 127) << 23).view(torch.float32)


def gumbel_noise(key: int, count: int, device: torch.device) -> Tensor:
    """Noise of the tokens 0 to count - 1: -ln(-ln u), float64 [count], u being 52 bits of SplitMix64 and a half."""
    ids = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    bits = _mixed(ids * _signed(0x9E3779B97F4A7C15) + _signed(key))
    u = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return -natural_log(-natural_log(u))


def natural_log(x: Tensor) -> Tensor:
    """ln x of normal numbers x > 0 to 1 unit in the last place, float64: FreeBSD's e_log.c as musl has it."""
    shifted = x.view(torch.int64) + 0x00095F6200000000  # x / 2^k from 0.7071 to 1.4142
    k = ((shifted >> 52) - 1023).double()
    f = ((shifted & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E00000000).view(torch.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    even = w * _polynomial(w, _LOG_EVEN)
    odd = z * _polynomial(w, _LOG_ODD)
    half = 0.5 * f * f
    return s * (half + (even + odd)) + k * _LN2_LOW - half + f + k * _LN2_HIGH


def mask_tokens(logits: Tensor, allowed: np.ndarray) -> Tensor:
    """-inf in place of the tokens whose bit is not set. ValueError for another number of words, or no bit set."""
    words = -(-logits.shape[0] // 32)
    if allowed.shape != (words,):
        raise ValueError(f"allowed: shape {list(allowed.shape)}, expected [{words}]")
    mask = _unpacked(logits, allowed)
    if not mask.any():
        raise ValueError("the mask allows no token; allowed: a mask with at least 1 token")
    return logits.where(mask, -_INF)


def _unpacked(logits: Tensor, allowed: np.ndarray) -> Tensor:
    words = torch.from_numpy(allowed.view(np.int32)).to(logits.device)  # pyright: ignore[reportUnknownMemberType]
    ids = torch.arange(logits.shape[0], device=logits.device)
    return (words[ids >> 5] >> (ids & 31)) & 1 == 1


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """coefficients[0] + x * (coefficients[1] + x * (...)), from the inside."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = x * total + coefficient
    return total


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer of 64-bit words, as int64."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count without sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    """A 64-bit word as int64."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _number(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A divisor on the tensor's device: by a number of the host, CUDA multiplies with its reciprocal."""
    return torch.full((1,), value, dtype=dtype, device=like.device)
