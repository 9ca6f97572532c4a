"""Rollouts: answers that the engine has sampled, and their log-probabilities under a model in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.engine import SamplingParams
from dsv4.engine.outputs import RequestOutput
from dsv4.kernels.gather import take_rows
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.choices import Choices
from dsv4.model.transformer import Transformer
from dsv4.post_training.policy import token_log_probabilities
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder

DrawnBy = tuple[tuple[int, int], ...]  # (version of the weights, tokens that they drew), in their order


class Sampler(Protocol):
    """Source of answers: an engine (`LLM`), or a service of several."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def prompts(self) -> PromptEncoder | None: ...

    def generate(
        self, prompts: list[list[int]], sampling_params: Sequence[SamplingParams], /
    ) -> list[RequestOutput]: ...


@dataclass
class DrawnOutput(RequestOutput):
    """An output whose tokens were drawn by weights of known versions."""

    drawn_by: DrawnBy = ()


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: its tokens (the end-of-sentence token too) and each one's log-probability in the engine.

    The log-probabilities are those at `temperature`, of the tokens that `sampling_masks` keep: a bit per token of the
    vocabulary for each token of the answer (kernels/sampling), or empty: all tokens.
    """

    prompt: int  # number of its prompt, which its group shares
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    text: str
    finished: bool  # False: cut off at max_tokens
    temperature: float = 1.0
    sampling_masks: tuple[bytes, ...] = ()
    choices: Choices | None = field(default=None, compare=False, repr=False)  # of all tokens but the last
    drawn_by: DrawnBy = ()  # empty: all by the weights of now
    error: str | None = None  # in words, if it could not be sampled to its end

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

    @property
    def temperature(self) -> float: ...

    @property
    def sampling_masks(self) -> Sequence[bytes]: ...

    @property
    def choices(self) -> Choices | None: ...

    @property
    def drawn_by(self) -> DrawnBy: ...

    @property
    def error(self) -> str | None: ...

    def release(self) -> None: ...


S = TypeVar("S", bound=Sampled)


def sample_rollouts(
    llm: Sampler,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    params: SamplingParams,
    seed: int,
    windows: Sequence[int] | None = None,
) -> list[Rollout]:
    """`group_size` answers to each prompt, in the order of the prompts. The same seed gives the same tokens.

    `windows`: most tokens of an answer by prompt, in place of `params.max_tokens`.
    `params.logprobs_mode` says of which distribution the log-probabilities are. ValueError if that is changed by a bias
    or penalties, which training does not know.
    """
    raw = params.logprobs_mode == "raw_logprobs"
    if not raw and (params.logit_bias or params.presence_penalty or params.frequency_penalty):
        raise ValueError(f"logprobs_mode is {params.logprobs_mode} with a bias or penalties; allowed: raw_logprobs")
    most = [params.max_tokens] * len(prompts) if windows is None else windows
    wanted = [
        replace(params, n=group_size, seed=seed + place * group_size, logprobs=True, max_tokens=tokens)
        for place, tokens in enumerate(most)
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
            1.0 if raw else params.temperature,
            tuple(output.sampling_masks),
            choices=choices_of(output),
            drawn_by=drawn_by(output),
            error=f"a rollout failed: {output.stop_reason}" if output.finish_reason == "abort" else None,
        )
        for place, first in enumerate(outputs)
        for output in first.outputs
    ]


def too_long(prompt: Sequence[int], room: int) -> str:
    """That a prompt is too long for a context that has room for `room` tokens of it, in words."""
    return f"has {len(prompt)} tokens; allowed by max_model_len: {room}"


def choices_of(output: RequestOutput) -> Choices | None:
    """Experts and entries that the engine has recorded with an output; None if neither."""
    if output.routed_experts is None and output.indexer_topk is None:
        return None
    return Choices(output.routed_experts, output.indexer_topk)


def drawn_by(output: RequestOutput) -> DrawnBy:
    """Versions of the weights that drew an output's tokens; empty if there is one version only, that of now."""
    return output.drawn_by if isinstance(output, DrawnOutput) else ()


def joined_runs(runs: Iterable[tuple[int, int]]) -> DrawnBy:
    """(version, tokens) in their order, neighbours of one version as one."""
    found: list[tuple[int, int]] = []
    for version, tokens in runs:
        if found and found[-1][0] == version:
            tokens += found.pop()[1]
        found.append((version, tokens))
    return tuple(found)


def answer_text(llm: Sampler, token_ids: Sequence[int]) -> str:
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


def answer_log_probabilities(model: Transformer, rollouts: Sequence[Sampled], aux: AuxLosses | None = None) -> Tensor:
    """log p of every answer's tokens, laid end to end, fp32 [n], of the distribution that each rollout's are of.

    Differentiable where the model takes gradients. ValueError for rollouts of several temperatures.
    """
    temperatures = {rollout.temperature for rollout in rollouts}
    if len(temperatures) > 1:
        raise ValueError(f"rollouts have temperatures {sorted(temperatures)}; allowed: one in a batch")
    hidden, tokens = answer_hidden(model, rollouts, aux)
    kept = sampling_masks(rollouts, len(model.head.matrix))
    kept = None if kept is None else kept.to(model.device)
    return token_log_probabilities(hidden, model.head.matrix, tokens, temperatures.pop(), kept)


def sampling_masks(rollouts: Sequence[Sampled], vocab: int) -> Tensor | None:
    """Masks of the answers' tokens, laid end to end, uint8 [n, ceil(vocab / 8)]; None if no rollout has any."""
    if not any(rollout.sampling_masks for rollout in rollouts):
        return None
    width = -(-vocab // 8)
    every = bytes([255]) * width
    masks = [mask for rollout in rollouts for mask in rollout.sampling_masks or [every] * rollout.num_tokens]
    return torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).view(-1, width)


def packed(rollouts: Iterable[S], tokens: int) -> list[list[S]]:
    """Consecutive rollouts of at most `tokens` tokens with their prompts; one that is longer is alone."""
    found: list[list[S]] = []
    room = 0
    for rollout in rollouts:
        size = rollout.num_document
        if not found or size > room:
            found.append([])
            room = tokens
        found[-1].append(rollout)
        room -= size
    return found
