"""Largest difference between the log-probabilities that training computes of served answers and the engine's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dsv4.checkpoint import load_model
from dsv4.engine import SamplingParams
from dsv4.post_training.problems import Problem
from dsv4.post_training.rollouts import answer_log_probabilities, packed, sample_rollouts
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.qat import stored_weights

MICRO_TOKENS = 4096


def train_serve_difference(
    folder: Path, problems: Sequence[Problem], max_tokens: int, seed: int = 1, device: str = "cpu"
) -> float:
    """Largest difference of a sampled token's log-probability between the engine and a training forward.

    One answer to each problem, sampled from the stored weights of a model folder.
    """
    model = load_model(folder, device=device, weights="widened").requires_grad_()
    policy = ServedPolicy(model, folder, max_num_seqs=16, device=device)
    with policy.serving() as llm:
        assert llm.prompts is not None, "problems are asked in text"
        prompts = [llm.prompts.encode(problem.prompt()) for problem in problems]
        rollouts = sample_rollouts(llm, prompts, 1, SamplingParams(max_tokens=max_tokens), seed)
    largest = 0.0
    with torch.no_grad(), stored_weights(model, indexers=False):
        for micro in packed(rollouts, MICRO_TOKENS):
            log_p = answer_log_probabilities(model, micro).cpu()
            sampled = torch.tensor([x for rollout in micro for x in rollout.log_probabilities])
            largest = max(largest, float((log_p - sampled).abs().max()))
    return largest
