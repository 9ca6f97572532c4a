"""Recorded experts and entries: those of the steps' forwards, however a request was cut, continued or interrupted."""

from __future__ import annotations

import random
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.engine import LLM, RequestOutput, SamplingParams
from dsv4.engine.draft_length import FixedLength
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.block import Block
from dsv4.model.transformer import Transformer

from ..model.tiny import random_ids, random_model, tiny_config
from .conftest import HistoryModel
from .prefixes import CONFIG, IDS, cache_of

BOTH: dict[str, Any] = {"enable_return_routed_experts": True, "enable_return_indexer_topk": True}
CONFIGS = [
    CONFIG,
    tiny_config(schedule=(4, 4), num_hash_layers=0, index_topk=1, n_routed_experts=3, num_experts_per_tok=1),
    tiny_config(schedule=(128, 0, 4), num_hash_layers=2, index_topk=33, n_routed_experts=17, num_experts_per_tok=5),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    {"num_pages": 9, "max_model_len": 1024, "max_num_batched_tokens": 77},
    {"max_num_seqs": 2, "time_slice": 3, "snapshot_interval": 64},
    {"enable_prefix_caching": False, "max_num_batched_tokens": 128},
    {"speculate": 3, "snapshot_interval": 32, "max_num_batched_tokens": 100},
]


@torch.no_grad()
def forward_choices(model: Transformer, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts and entries of one forward of the modules over a whole sequence, by hooks of this test's own."""
    experts: list[Tensor] = []
    entries: list[list[Tensor]] = []  # of a layer that told nothing, no token chose
    every = torch.full((len(tokens), model.config.index_topk), -1)
    with ExitStack() as hooks:
        for layer in model.layers:
            block = cast(Block, layer)
            if block.ffn.gate.tid2eid is None:
                hook = block.ffn.gate.register_forward_hook(lambda _, __, output: experts.append(output[1]))
                hooks.callback(hook.remove)
            if block.attn.indexer is not None:
                entries.append([every])
                block.attn.choice_watcher = partial(_note, entries[-1])
                hooks.callback(setattr, block.attn, "choice_watcher", None)
        ReferenceBackend(model).run(RaggedBatch.pack([tokens]), None)
    return torch.stack(experts, 1).numpy(), torch.stack([told[-1] for told in entries], 1).numpy()


def _note(to: list[Tensor], chosen: Tensor | None) -> None:
    to += [] if chosen is None else [chosen]


def assert_recorded(model: Transformer, output: RequestOutput) -> None:
    tokens = [*output.prompt_token_ids, *output.token_ids][:-1]
    experts, entries = forward_choices(model, tokens)
    assert output.routed_experts is not None and output.indexer_topk is not None
    assert output.routed_experts.dtype == np.int16 and np.array_equal(output.routed_experts, experts)
    assert output.indexer_topk.dtype == np.int32 and np.array_equal(output.indexer_topk, entries)


@pytest.mark.parametrize("config", CONFIGS, ids=["csa-hca", "csa", "wide"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "chunks", "pages", "turns", "no-cache", "drafts"])
def test_recorded_choices_are_those_of_an_independent_forward(
    path: str, config: ModelConfig, options: dict[str, Any]
) -> None:
    model = random_model(config)
    llm = LLM(model, **BOTH, **options)
    if llm.core.speculator is not None:
        llm.core.speculator.lengths = FixedLength(3)
    ids: list[int] = random_ids(config, 600).tolist()
    lengths = (1, 3, 4, 5, 127, 129, 255) if path == "native" else (3, 129)
    rng = random.Random(len(options))
    prompts = [ids[:length] for length in lengths]
    params = [
        SamplingParams(seed=seed, max_tokens=rng.choice((1, 2, 5, 9)), ignore_eos=True) for seed in range(len(prompts))
    ]
    first = llm.generate(prompts, params)
    following = [[*output.prompt_token_ids, *output.token_ids, *ids[7:12]] for output in first]  # the next turns
    second = llm.generate(following, params)
    for output in (*first, *second):
        assert_recorded(model, output)
    if options.get("enable_prefix_caching", True):
        assert second[-1].cached_tokens >= lengths[-1]
    if "num_pages" in options and path == "native":
        assert llm.core.scheduler.cache_manager.num_preemptions + second[-1].cached_tokens > 0
    if options.get("speculate"):
        assert sum(output.num_accepted_tokens for output in second) > 0 or path == "reference"


@torch.no_grad()
def shake(model: Transformer, amount: float) -> None:
    """Move routers and indexers in place, as new weights do."""
    for name, parameter in model.named_parameters():
        if "gate.weight" in name or "indexer.w" in name:
            parameter.copy_(
                parameter + amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )


@pytest.mark.parametrize("preempt", [False, True], ids=["undisturbed", "preempted"])
def test_each_token_has_the_choices_of_the_step_that_computed_it(path: str, preempt: bool) -> None:
    """Weights change between two steps: no forward over the finished sequence has these choices."""
    model = random_model(CONFIG)
    llm = LLM(model, **BOTH, max_num_batched_tokens=64)
    core = llm.core
    request = core.new_request(IDS[:130], SamplingParams(max_tokens=8, ignore_eos=True, seed=3))
    core.add(request)
    while len(request.output.token_ids) < 4:
        core.step()
    before, computed = forward_choices(model, request.tokens(0, 133)), request.num_computed_tokens
    assert computed == 133
    if preempt:  # and its state is lost, so that all is computed again, with the new weights
        core.scheduler.cache_manager.distrust(earlier=False)
        core.scheduler._preempt(request)
        assert request.num_computed_tokens == 0
    shake(model, 1.0)
    while not request.finished:
        core.step()
    output = request.output
    found = output.routed_experts, output.indexer_topk
    after = forward_choices(model, request.tokens(0, 137))
    for recorded, old, new in zip(found, before, after, strict=True):
        assert recorded is not None and len(recorded) == 137
        assert np.array_equal(recorded[:133], old)
        assert not np.array_equal(recorded[:133], new[:133])
    if preempt:
        assert np.array_equal(found[0][133:], after[0][133:]) and np.array_equal(found[1][133:], after[1][133:])


def test_what_is_not_asked_for_is_not_recorded(path: str) -> None:
    model = random_model(CONFIG)
    params = SamplingParams(max_tokens=2, ignore_eos=True, n=2, seed=1)
    (plain,) = LLM(model).generate([IDS[:70]], params)
    assert plain.routed_experts is None and plain.indexer_topk is None
    for name, other in (("routed_experts", "indexer_topk"), ("indexer_topk", "routed_experts")):
        llm = LLM(model, **{f"enable_return_{name}": True})
        (output,) = llm.generate([IDS[:70]], params)
        for one, same in zip(output.outputs, plain.outputs, strict=True):
            assert one.token_ids == same.token_ids
            assert getattr(one, name).shape[0] == 71 and getattr(one, other) is None


def test_choices_of_a_prefix_end_with_it() -> None:
    model = random_model(CONFIG)
    llm = LLM(model, **BOTH)
    llm.generate([IDS[:300]], SamplingParams(max_tokens=1))
    recorder = llm.core.runner.recorder
    assert recorder is not None and len(recorder._stored) > 0
    llm.reset_prefix_cache()
    assert len(recorder._stored) == 0 and cache_of(llm).lengths == [0] * 8


def test_what_cannot_be_recorded_is_refused(tmp_path: Path, model: HistoryModel) -> None:
    for name in BOTH:
        with pytest.raises(ValueError, match=f"{name} is True and cache_dir '.*', where prefixes are without"):
            LLM(random_model(CONFIG), cache_dir=str(tmp_path), **{name: True})
        with pytest.raises(ValueError, match=f"{name} is True; a HistoryModel does not tell what it chooses"):
            LLM(model, **{name: True})
