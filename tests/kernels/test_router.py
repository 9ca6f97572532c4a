"""Router: every rung against the formula in float64; ties, repeats in the table, extremes."""

import pytest
import torch

from dsv4.kernels.router import route_by_score, route_by_token

from .tools import near, noise, set_threads


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (3, 6, 2), (40, 17, 5), (9, 256, 6), (2, 384, 8)])
def test_choice_and_weights(rung: str, tokens: int, experts: int, k: int) -> None:
    logits, bias = noise(tokens, experts, scale=4), noise(experts, seed=1)
    logits[0, :] = logits[0, 0]  # equal scores: the lower index wins if the biases are equal too
    bias[: experts // 2] = 0.5
    logits[-1, -1], logits[-1, 0] = -200.0, 200.0
    ids = torch.arange(tokens) % 5
    generator = torch.Generator().manual_seed(k)
    table = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(5)])
    table[1, -1] = table[1, 0]  # a repeat counts in the sum and weighs 0
    exact = torch.nn.functional.softplus(logits.double()).sqrt()
    ranked = (exact.float() + bias).sort(dim=1, descending=True, stable=True).indices
    calls = (
        (lambda part: route_by_score(logits[part], bias, k, 2.5), ranked[:, :k].sort(dim=1).values),
        (lambda part: route_by_token(logits[part], table, ids[part], 2.5), table[ids]),
    )
    for route, chosen in calls:
        weights, index, scores = route(slice(None))
        assert torch.equal(index, chosen)
        picked = exact.gather(1, chosen)
        want = (picked / picked.sum(-1, keepdim=True) * 2.5).float()
        repeated = torch.tensor([[e in row[:i] for i, e in enumerate(row)] for row in chosen.tolist()])
        assert near(weights, want.masked_fill(repeated, 0.0)) and near(scores, exact.float())
        for threads in (1, 2):
            set_threads(rung, threads)
            alone = route(slice(tokens - 1, tokens))
            assert torch.equal(alone[0], weights[-1:]) and torch.equal(alone[1], index[-1:])


def test_a_strided_bias(rung: str) -> None:
    logits, bias = noise(5, 7), noise(7, 2, seed=1)[:, 1]
    got, want = (route_by_score(logits, b, 3, 1.5) for b in (bias, bias.clone()))
    assert all(map(torch.equal, got, want))


def test_gradients_far_from_zero_and_at_it(rung: str) -> None:
    """Below -103.97 a score is zero in fp32, and so is its slope; near that it has few bits."""
    values = [0.0, -20.0, -60.0, -86.9, -87.1, -88.6, -88.8, -90.0, -100.0, 30.0, 90.0]
    logits = torch.tensor(values)[:, None].requires_grad_()
    scores = route_by_score(logits, torch.zeros(1), 1, 1.0)[2]
    (got,) = torch.autograd.grad(scores.sum(), logits)
    exact = logits.detach().double()
    want = exact.sigmoid() / (2.0 * torch.nn.functional.softplus(exact, threshold=300.0).sqrt())
    tolerance = torch.where(exact < -95.0, 0.05, 1e-4)
    assert ((got - want).abs() <= tolerance * want).all(), (got / want).flatten()
    logits = torch.tensor([[-104.5, -300.0, -3e38, -float("inf"), 1.0]]).requires_grad_()
    (got,) = torch.autograd.grad(route_by_score(logits, torch.zeros(5), 1, 1.0)[2].sum(), logits)
    assert torch.equal(got[:, :4], torch.zeros(1, 4)) and got[0, 4] > 0.0


def test_gradients_flow_through_the_weights_and_not_the_choice() -> None:
    logits, bias = noise(5, 7).requires_grad_(), noise(7, seed=1)
    weights, index, _ = route_by_score(logits, bias, 3, 1.5)
    pull = noise(5, 3, seed=2)
    (got,) = torch.autograd.grad(weights, logits, pull)
    exact = logits.detach().double().requires_grad_()
    picked = torch.nn.functional.softplus(exact).sqrt().gather(1, index)
    (want,) = torch.autograd.grad(picked / picked.sum(-1, keepdim=True) * 1.5, exact, pull.double())
    assert near(got, want.float(), 1e-5)
