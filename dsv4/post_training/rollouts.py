"""Rollouts: answers that the engine has sampled, and their log-probabilities under a model in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dsv4.engine import LLM, SamplingParams
from dsv4.kernels.gather import take_rows
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.post_training.policy import token_log_probabilities


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: its tokens (the end-of-sentence token too) and each one's log-probability in the engine."""

    prompt: int  # number of its prompt, which its group shares
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    text: str
    finished: bool  # False: cut off at max_tokens

    @property
    def document(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt_token_ids + self.token_ids

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return len(self.token_ids)

    @property
    def num_document(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def places(self) -> Sequence[int]:
        """Places of the sampled tokens in the document."""
        return range(len(self.prompt_token_ids), self.num_document)

    def release(self) -> None:
        """Nothing: a rollout is small."""


class Sampled(Protocol):
    """A document of which some tokens were sampled: a rollout, or a whole episode. `release` drops its arrays."""

    @property
    def prompt(self) -> int: ...

    @property
    def document(self) -> Sequence[int]: ...

    @property
    def places(self) -> Sequence[int]: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def log_probabilities(self) -> Sequence[float]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_document(self) -> int: ...

    @property
    def text(self) -> str: ...

    @property
    def finished(self) -> bool: ...

    def release(self) -> None: ...


def sample_rollouts(
    llm: LLM, prompts: Sequence[Sequence[int]], group_size: int, params: SamplingParams, seed: int
) -> list[Rollout]:
    """`group_size` answers to each prompt, in the order of the prompts. The same seed gives the same tokens."""
    wanted = [
        replace(params, n=group_size, seed=seed + place * group_size, logprobs=True) for place in range(len(prompts))
    ]
    outputs = llm.generate([list(prompt) for prompt in prompts], wanted)
    return [
        Rollout(
            place,
            tuple(output.prompt_token_ids),
            tuple(output.token_ids),
            tuple(output.logprobs),
            answer_text(llm, output.token_ids),
            output.finish_reason == "stop",
        )
        for place, first in enumerate(outputs)
        for output in first.outputs
    ]


def answer_text(llm: LLM, token_ids: Sequence[int]) -> str:
    """Text of an answer, special tokens included, without the end of the sentence."""
    if llm.tokenizer is None:
        return ""
    ids = list(token_ids)
    return llm.tokenizer.decode(ids[:-1] if ids and ids[-1] in llm.config.eos_token_ids else ids)


def answer_rows(rollouts: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
    """Of the documents laid end to end: rows after which a sampled token comes, and those tokens; int64."""
    rows: list[int] = []
    start = 0
    for rollout in rollouts:
        rows.extend(start + place - 1 for place in rollout.places)
        start += rollout.num_document
    tokens = [token for rollout in rollouts for token in rollout.token_ids]
    return torch.tensor(rows), torch.tensor(tokens)


def answer_hidden(
    model: Transformer, rollouts: Sequence[Sampled], aux: AuxLosses | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states fp32 [n, d] that predict the answers' tokens, and those tokens int64 [n]; a training forward."""
    batch = RaggedBatch.pack([rollout.document for rollout in rollouts], device=model.device)
    rows, tokens = (index.to(model.device) for index in answer_rows(rollouts))
    streams = model.forward_ragged(batch, aux=aux)
    return model.head_input(take_rows(streams, rows)), tokens


def answer_log_probabilities(
    model: Transformer, rollouts: Sequence[Sampled], temperature: float = 1.0, aux: AuxLosses | None = None
) -> Tensor:
    """log p of every answer's tokens, laid end to end, fp32 [n]; differentiable where the model takes gradients."""
    hidden, tokens = answer_hidden(model, rollouts, aux)
    return token_log_probabilities(hidden, model.head.matrix, tokens, temperature)
