"""Log-probabilities of sampled tokens: value, gradient, sampling mask, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.post_training.policy import token_log_probabilities

V = 61


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, sampled tokens, and a mask that keeps about half of the vocabulary, those tokens too."""
    g = torch.Generator().manual_seed(tokens)
    token_ids = torch.randint(0, V, (tokens,), generator=g)
    kept = torch.rand(tokens, V, generator=g) < 0.5
    kept.scatter_(1, token_ids.unsqueeze(1), True)
    return torch.randn(tokens, 24, generator=g), torch.randn(V, 24, generator=g), token_ids, kept


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_value_and_gradient_are_those_of_autograd(chunk: int, temperature: float, masked: bool) -> None:
    hidden, head, token_ids, kept = inputs(13)
    mask = kept if masked else None
    weights = torch.linspace(-1, 2, 13)
    mine = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    got = token_log_probabilities(*mine, token_ids, temperature, mask, chunk)
    (got * weights).sum().backward()
    exact = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    logits = exact[0] @ exact[1].T / temperature
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    want = logits.log_softmax(-1).gather(1, token_ids.unsqueeze(1)).squeeze(1)
    (want * weights).sum().backward()
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)
    for found, expected in zip(mine, exact, strict=True):
        assert found.grad is not None and expected.grad is not None
        assert (found.grad.double() - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max()


def test_a_sampled_token_that_the_mask_forbids_is_an_error() -> None:
    hidden, head, token_ids, kept = inputs(5)
    kept[3, token_ids[3]] = False
    with pytest.raises(ValueError, match=f"token {int(token_ids[3])} at place 3 was sampled, but its sampling mask"):
        token_log_probabilities(hidden, head, token_ids, kept=kept)


def test_a_temperature_of_zero_is_an_error() -> None:
    hidden, head, token_ids, _ = inputs(5)
    with pytest.raises(ValueError, match=r"temperature is 0\.0; allowed: more than 0"):
        token_log_probabilities(hidden, head, token_ids, 0.0)
