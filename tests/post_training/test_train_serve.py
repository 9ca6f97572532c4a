"""Training computes of a rollout what the engine computed when it sampled it: the same bits."""

from __future__ import annotations

import pytest
import torch

import dsv4
from dsv4.config import nano_path
from dsv4.engine import SamplingParams
from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.transformer import Transformer
from dsv4.post_training.rollouts import answer_log_probabilities, sample_rollouts
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.qat import stored_weights

pytestmark = pytest.mark.skipif(backends.native_module() is None, reason="the native kernels are not built")


def shaken_nano(numerics: str) -> Transformer:
    """Nano with masters between the stored values, as training leaves them."""
    model = dsv4.load(nano_path(), weights="widened", numerics=numerics).requires_grad_()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(1 + 0.02 * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("numerics", ["float", "shipped"])
def test_log_probabilities_of_rollouts_have_the_samplers_bits(numerics: str) -> None:
    model = shaken_nano(numerics)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = ServedPolicy(model, nano_path(), max_num_seqs=6, max_model_len=512)
    prompts = [[model.config.bos_token_id, *range(7, 7 + n)] for n in (3, 130, 33)]
    with policy.serving() as llm:
        rollouts = sample_rollouts(llm, prompts, 2, SamplingParams(max_tokens=70, ignore_eos=True), seed=1)
    assert len(rollouts) == 6 and len({r.token_ids for r in rollouts}) == 6
    assert all(torch.equal(p, masters[name]) for name, p in model.named_parameters())
    assert not model.frozen and model.head.weight.requires_grad
    with stored_weights(model, indexers=False):
        log_p = answer_log_probabilities(model, rollouts, aux=AuxLosses())
    assert log_p.requires_grad
    sampled = torch.tensor([x for rollout in rollouts for x in rollout.log_probabilities])
    assert torch.equal(log_p.detach(), sampled)


def test_the_engine_follows_the_weights() -> None:
    """The second round samples from the updated weights, and no prefix of the old ones is used."""
    model = shaken_nano("float")
    policy = ServedPolicy(model, nano_path(), quantized=False, max_num_seqs=4, max_model_len=256)
    prompt, params = [[model.config.bos_token_id, *range(9, 140)]], SamplingParams(max_tokens=8, ignore_eos=True)
    with policy.serving() as llm:
        before = sample_rollouts(llm, prompt, 1, params, seed=1)
    with torch.no_grad():
        model.head.weight.mul_(0.5)
        model.embed.weight.mul_(1.1)
    with policy.serving() as llm:
        after = sample_rollouts(llm, prompt, 1, params, seed=1)
    assert before[0].log_probabilities != after[0].log_probabilities
    log_p = answer_log_probabilities(model, after)
    assert torch.equal(log_p.detach(), torch.tensor(after[0].log_probabilities))
