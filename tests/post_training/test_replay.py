"""A rollout's experts, entries and sampling masks, recorded when it was sampled and replayed in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.config import ModelConfig, nano_path
from dsv4.engine import LLM, SamplingParams
from dsv4.kernels import backends
from dsv4.kernels.sampling import unpack_masks
from dsv4.model.attention import attention
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.block import Block
from dsv4.model.choices import ChoiceNotes, indexed_layers, noting, routed_layers
from dsv4.model.moe import Gate
from dsv4.model.transformer import Transformer
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings
from dsv4.post_training.learner import Judged, LearnerSettings, update
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.replay import ReplaySettings, replaying
from dsv4.post_training.rewards import RewardSettings
from dsv4.post_training.rollouts import Rollout, answer_log_probabilities, sample_rollouts, sampling_masks
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.qat import stored_weights
from dsv4.training.schedule import Schedule

from ..model.tiny import random_model, tiny_config
from .small_policy import TextProblems, has_f, small_policy

ALL = ReplaySettings(routing=True, indexer=True)
FILTERED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01)
native = pytest.mark.skipif(backends.native_module() is None, reason="bits agree on the native kernels")


def prompts_of(policy: ServedPolicy) -> list[list[int]]:
    return [[policy.model.config.bos_token_id, *range(7, 7 + n)] for n in (3, 90)]


def sampled(policy: ServedPolicy, params: SamplingParams, settings: ReplaySettings = ALL) -> list[Rollout]:
    """Four rollouts; two have tokens that see more entries than the indexer keeps, from position 35 on."""
    policy.set_options(**settings.engine_options)
    params = replace(params, max_tokens=20, ignore_eos=True, logprobs_mode=settings.logprobs_mode)
    with policy.serving() as llm:
        return sample_rollouts(llm, prompts_of(policy), 2, params, seed=1)


@contextmanager
def noted(model: Transformer, rollouts: Sequence[Rollout]) -> Iterator[ChoiceNotes]:
    """Notes of the next forward of the modules over the rollouts' documents."""
    notes = ChoiceNotes.of(model.config, sum(rollout.num_document for rollout in rollouts), model.device)
    with noting(model.config, model.layers, notes):
        yield notes


def recorded(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    assert rollout.choices is not None
    assert rollout.choices.experts is not None and rollout.choices.entries is not None
    return rollout.choices.experts, rollout.choices.entries


def shake(model: Transformer, part: str) -> None:
    """Move weights, as another engine's rounding would move what is computed from them, only more."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=g))


def gradients(model: Transformer, rollouts: list[Rollout], aux: AuxLosses) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradient of their weighted sum and the indexer's loss."""
    model.zero_grad()
    log_p = answer_log_probabilities(model, rollouts, aux=aux)
    ((log_p * torch.linspace(-1, 2, len(log_p))).sum() + aux.indexer_loss).backward()
    return log_p.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@native
@pytest.mark.parametrize("params", [SamplingParams(), FILTERED], ids=["plain", "filtered"])
def test_replay_of_what_was_recorded_changes_no_bit(params: SamplingParams) -> None:
    policy, _ = small_policy()
    model = policy.model
    rollouts = sampled(policy, params)
    with stored_weights(model, indexers=False):
        without, free = gradients(model, rollouts, AuxLosses())
        aux = replaying(rollouts, model)
        kept, replayed = gradients(model, rollouts, aux)
    assert set(aux.routing) == {"layers.1.ffn", "layers.2.ffn"} and set(aux.entries) == {"layers.1.attn"}
    assert (aux.expert_differences, aux.entry_differences) == (0, 0)
    assert torch.equal(without, kept)
    assert torch.equal(kept, torch.tensor([x for rollout in rollouts for x in rollout.log_probabilities]))
    assert free.keys() == replayed.keys() and all(torch.equal(free[name], g) for name, g in replayed.items())


def test_records_are_of_every_token_but_the_last() -> None:
    policy, _ = small_policy()
    rollouts = sampled(policy, SamplingParams())
    top_k = policy.model.config.index_topk
    for rollout in rollouts:
        experts, entries = recorded(rollout)
        assert experts.dtype == np.int16 and entries.dtype == np.int32
        assert len(experts) == len(entries) == len(rollout.document) - 1
        visible = (np.arange(len(entries)) + 1) // 4
        assert ((entries >= 0).all(2)[:, 0] == (visible > top_k)).all()
    for settings in (ReplaySettings(routing=True), ReplaySettings(indexer=True)):
        aux = replaying(sampled(policy, SamplingParams(), settings), policy.model)
        assert bool(aux.routing) == settings.routing and bool(aux.entries) == settings.indexer


def rows_of(config: ModelConfig, rollouts: list[Rollout], name: str) -> Tensor:
    """Restatement: the recorded choices of a layer, token by token; -1 where nothing was recorded."""
    layers = routed_layers(config) if name.endswith("ffn") else indexed_layers(config)
    layer = layers.index(int(name.split(".")[1]))
    found: list[list[int]] = []
    for rollout in rollouts:
        experts, entries = recorded(rollout)
        kept = (experts if name.endswith("ffn") else entries)[:, layer]
        found += [*kept.tolist(), [-1] * kept.shape[1]]
    return torch.tensor(found)


@pytest.mark.parametrize("part", ["gate.weight", "indexer", "attn_norm"])
def test_other_weights_keep_the_choices_of_the_rollout(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient are those of a restatement whose router and indexer cannot choose anything else."""
    policy, _ = small_policy()
    model = policy.model
    rollouts = sampled(policy, SamplingParams())
    shake(model, part)
    with noted(model, rollouts) as notes:
        free, unkept = gradients(model, rollouts, AuxLosses())
    aux = replaying(rollouts, model)
    with noted(model, rollouts) as replay:
        kept, replayed = gradients(model, rollouts, aux)
    assert aux.expert_differences + aux.entry_differences > 0
    assert not (
        torch.equal(taken(notes.experts), taken(replay.experts))
        and torch.equal(taken(notes.entries), taken(replay.entries))
    )
    laid = torch.stack([aux.routing[f"layers.{layer}.ffn"] for layer in routed_layers(model.config)], 1)
    last = torch.tensor([rollout.num_document for rollout in rollouts]).cumsum(0) - 1
    assert (laid[last] == -1).all()
    laid[last] = taken(replay.experts)[last].long()  # the router's own
    assert torch.equal(laid, taken(replay.experts).long())

    select = attention.select_entries
    for block in cast("list[Block]", list(model.layers)):
        gate = block.ffn.gate
        if gate.tid2eid is None:
            monkeypatch.setattr(gate, "forward", fixed_gate(gate, rows_of(model.config, rollouts, block.ffn.name)))
        if block.attn.indexer is not None:
            chosen = rows_of(model.config, rollouts, block.attn.name)

            def fixed(*given: Any, chosen: Tensor = chosen) -> tuple[Tensor | None, list[Tensor | None]]:
                own, _ = select(*given)
                assert own is not None
                chosen[last] = own[last]
                return chosen, []

            monkeypatch.setattr("dsv4.model.attention.attention.select_entries", fixed)
    slow, want = gradients(model, rollouts, AuxLosses())
    assert torch.allclose(kept, slow, rtol=1e-5, atol=1e-5) and not torch.allclose(kept, free, rtol=1e-5, atol=1e-5)
    assert replayed.keys() == want.keys()
    assert all(close(replayed[name], expected) for name, expected in want.items())
    assert not all(close(unkept[name], expected) for name, expected in want.items())


@native
@pytest.mark.parametrize("engine", ["native", "reference"])
def test_training_on_other_kernels_keeps_the_engines_choices(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts are so much alike that rounding decides between them, and between what later layers then choose."""
    config = tiny_config(schedule=(0, 4, 4, 128), index_topk=4, num_experts_per_tok=1)
    model = random_model(config).requires_grad_()
    for block in cast("list[Block]", list(model.layers)):
        if block.ffn.gate.bias is not None:
            gate, noise = block.ffn.gate.weight.data, torch.randn(config.hidden_size, generator=torch.Generator())
            gate[1] = gate[0] * (1 + 3e-7 * noise)
            block.ffn.gate.bias.data[:2] = 5.0

    @contextmanager
    def kernels(name: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            if name == "reference":
                patch.setattr(backends, "native_module", lambda: None)
            yield

    prompts, params = [[5, 7, 9], list(range(3, 93)), [11] * 130], SamplingParams(max_tokens=5, ignore_eos=True)
    with kernels(engine):
        llm = LLM(model, **ALL.engine_options, max_num_batched_tokens=50)
        assert model.backend.name == engine
        rollouts = sample_rollouts(llm, prompts, 2, params, seed=1)
        model.requires_grad_()
        _, want = gradients(model, rollouts, replaying(rollouts, model))
    with kernels("reference" if engine == "native" else "native"):
        with noted(model, rollouts) as notes:
            _, free = gradients(model, rollouts, AuxLosses())
        aux = replaying(rollouts, model)
        with noted(model, rollouts) as replay:
            _, kept = gradients(model, rollouts, aux)
    assert aux.expert_differences > 0
    start, differ = 0, [False, False]
    for rollout in rollouts:
        stop = start + rollout.num_document - 1
        for kind, (mine, own, used) in enumerate(
            zip(recorded(rollout), (notes.experts, notes.entries), (replay.experts, replay.entries), strict=True)
        ):
            assert np.array_equal(mine, taken(used)[start:stop].numpy())
            differ[kind] |= not np.array_equal(mine, taken(own)[start:stop].numpy())
        start = stop + 1
    assert differ == [True, True]
    assert all(close(kept[name], expected) for name, expected in want.items())
    assert not all(close(free[name], expected) for name, expected in want.items())


def taken(notes: Tensor | None) -> Tensor:
    assert notes is not None
    return notes


def close(found: Tensor, expected: Tensor) -> bool:
    """True but for fp32's rounding; scalars of the read-out are sums that cancel."""
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max() + 3e-7)


def fixed_gate(gate: Gate, experts: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Restatement of a router whose choice is fixed: normalized affinities of these experts."""

    def forward(x: Tensor, token_ids: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.nn.functional.softplus(x @ gate.weight.T).sqrt()
        assert gate.bias is not None
        own = (scores + gate.bias).topk(experts.shape[1]).indices.sort().values
        chosen = torch.where(experts < 0, own, experts)
        kept = torch.stack([row[index] for row, index in zip(scores, chosen, strict=True)])
        return kept / (kept.sum(-1, keepdim=True) + 1e-20) * gate.config.routed_scaling_factor, chosen, scores

    return forward


def test_probabilities_of_the_kept_tokens_sum_to_1() -> None:
    policy, _ = small_policy()
    model = policy.model
    rollouts = sampled(policy, FILTERED)
    packed = sampling_masks(rollouts, model.config.vocab_size)
    assert packed is not None
    masks = unpack_masks(packed, model.config.vocab_size)
    assert int(masks.sum(-1).min()) >= 1 and int(masks.sum(-1).max()) <= 20
    one = rollouts[0]
    total = torch.zeros(len(one.token_ids))
    for place, mask in enumerate(masks[: len(one.token_ids)]):
        for token in mask.nonzero().flatten().tolist():  # each kept token in place of the one that was drawn
            other = replace(one, token_ids=(*one.token_ids[:place], token))
            other = replace(other, sampling_masks=one.sampling_masks[: place + 1])
            with stored_weights(model, indexers=False), torch.no_grad():
                total[place] += answer_log_probabilities(model, [other])[-1].exp()
        if place == 4:
            break
    assert torch.allclose(total[:5], torch.ones(5), atol=1e-5)


@native
@pytest.mark.parametrize("keep", [True, False], ids=["mask kept", "mask dropped"])
def test_on_policy_ratios_are_1(keep: bool) -> None:
    """Without the mask, old and new probabilities are both those before the filters."""
    policy, optimizer = small_policy()
    rollouts = sampled(policy, FILTERED, ReplaySettings(sampling_mask=keep))
    assert all(bool(rollout.sampling_masks) == keep and rollout.temperature == 0.7 for rollout in rollouts)
    batch = [Judged(rollout, gain) for rollout, gain in zip(rollouts, (1.0, -1.0, 0.5, 2.0), strict=True)]
    done = update(policy.model, optimizer, batch, 1e-3, LearnerSettings(GRPOSettings(kl=0.0)))
    assert done.largest_difference == 0.0 and done.clipped == 0.0


def test_temperatures_are_not_mixed_and_records_are_whole() -> None:
    policy, _ = small_policy()
    rollouts = sampled(policy, SamplingParams())
    with pytest.raises(ValueError, match=r"temperatures \[0\.5, 1\.0\]; allowed: one in a batch"):
        answer_log_probabilities(policy.model, [rollouts[0], replace(rollouts[1], temperature=0.5)])
    with pytest.raises(ValueError, match="1 of 2 rollouts have no recorded choices; allowed: all or none"):
        replaying([rollouts[0], replace(rollouts[1], choices=None)], policy.model)


def test_what_training_cannot_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="logprobs_mode is 'all'; allowed: raw_logprobs, tempered"):
        SamplingParams(logprobs_mode="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tempered_logprobs at temperature 0; allowed: raw_logprobs"):
        SamplingParams(logprobs_mode="tempered_logprobs", temperature=0.0)
    policy, _ = small_policy()
    with policy.serving() as llm, pytest.raises(ValueError, match="processed_logprobs with a bias or penalties"):
        sample_rollouts(llm, [[1]], 1, replace(FILTERED, logit_bias={3: 1.0}, logprobs_mode="processed_logprobs"), 1)


def test_masks_and_log_probabilities_do_not_depend_on_preemption_and_chunks() -> None:
    policy, _ = small_policy()
    want = sampled(policy, FILTERED)
    cut = ServedPolicy(policy.model, nano_path(), max_num_seqs=2, max_model_len=256, max_num_batched_tokens=7)
    got = sampled(cut, FILTERED)
    assert [(r.token_ids, r.sampling_masks) for r in got] == [(r.token_ids, r.sampling_masks) for r in want]
    if backends.native_module() is not None:
        for one, other in zip(got, want, strict=True):
            assert all(np.array_equal(mine, its) for mine, its in zip(recorded(one), recorded(other), strict=True))


def test_a_run_says_how_many_choices_differed(tmp_path: Path) -> None:
    policy, optimizer = small_policy()
    loop = LoopSettings(steps=2, schedule=Schedule(0.05, 0, 0.0), prompts=2, max_tokens=40, save_every=1)
    settings = GRPORunSettings(
        LearnerSettings(GRPOSettings(kl=0.0)), RewardSettings(judge_cut_off=True), group_size=4,
        sampling=FILTERED, replay=ALL,
    )  # fmt: skip
    GRPORun(policy, optimizer, TextProblems(has_f), loop, settings, tmp_path, quiet=True).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    asked = [line for line in lines if line["updates"]]
    assert asked and all(line["routing_differences"] == line["indexer_differences"] == 0 for line in asked)
    if backends.native_module() is not None:
        assert all(line["train_serve_difference"] == 0.0 for line in asked)
