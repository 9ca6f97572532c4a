"""Answers from the rollout service, by the interface of the engine: groups and episodes sample through either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from dsv4.config import ModelConfig
from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.engine.outputs import RequestOutput
from dsv4.engine.sampler import output_seed
from dsv4.model.choices import Choices
from dsv4.post_training.rollout_service.records import Finished, NewRequest
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.rollouts import DrawnOutput, joined_runs
from dsv4.tokenizer import Tokenizer
from dsv4.tokenizer.prompts import PromptEncoder


class ServiceSampler:
    """Samples for one call of problems, the first of which is `problem`, with the weights of now or later ones.

    The same prompts and parameters are the same requests, so that a run that was killed while it waited finds their
    answers, or goes on from their logs.
    """

    def __init__(self, service: RolloutService, config: ModelConfig, problem: int) -> None:
        self._service, self._problem, self._version = service, problem, service.version
        self.config, self.max_model_len = config, service.max_model_len
        self.prompts: PromptEncoder = service.prompts
        self.tokenizer: Tokenizer = service.prompts.tokenizer

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """As `LLM.generate`: the same tokens, log-probabilities, masks and choices.

        A request that failed is an abort, with the reason. ValueError for parameters without a seed.
        """
        requests = [
            NewRequest(place, tuple(prompt), _keywords(params, index))
            for place, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
            for index in range(params.n)
        ]
        batch = stable_hash(*((request.prompt_token_ids, sorted(request.params.items())) for request in requests)) >> 1
        finished = self._service.ask(batch, requests, self._problem, self._version)
        outputs: list[RequestOutput] = []
        for place in range(len(prompts)):
            first, *others = [_output(one) for one in finished if one.prompt == place]
            first.others = others
            outputs.append(first)
        return outputs


def _keywords(params: SamplingParams, index: int) -> dict[str, Any]:
    """The parameters of output `index` of a prompt that differ from the defaults."""
    one = replace(params, n=1, seed=None if params.seed is None else output_seed(params.seed, index))
    default = SamplingParams()
    return {
        field.name: getattr(one, field.name)
        for field in fields(one)
        if getattr(one, field.name) != getattr(default, field.name)
    }


def _output(one: Finished) -> RequestOutput:
    found = DrawnOutput(list(one.prompt_token_ids), drawn_by=joined_runs((token.version, 1) for token in one.tokens))
    found.token_ids = [token.token_id for token in one.tokens]
    found.logprobs = [token.log_probability for token in one.tokens]
    found.sampling_masks = [token.mask for token in one.tokens if token.mask is not None]
    recorded = [token.choices for token in one.tokens if token.choices is not None]
    if recorded:
        choices = Choices.joined(recorded)
        found.routed_experts, found.indexer_topk = choices.experts, choices.entries
    if one.error is not None:
        found.finish_reason, found.stop_reason = "abort", one.error
    else:
        found.finish_reason = "stop" if one.finish_reason == "stop" else "length"
    return found
