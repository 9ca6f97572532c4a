"""GRPO end to end on a small model: the reward rises, train equals serve, a killed run resumes to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.checkpoint import load_model
from dsv4.config import nano_path
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.post_training import grpo_run
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings, even_parts
from dsv4.post_training.learner import LearnerSettings, Update, update
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.recipe_run import make_policy, tokenizer_files
from dsv4.post_training.recipes import GRPORecipe
from dsv4.post_training.rewards import Reward, RewardSettings
from dsv4.post_training.run_keys import OptimizerSection
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.updates import UpdateError
from dsv4.post_training.v4_run import tokens_of
from dsv4.training.export import TOKENIZER_FILES, export_model
from dsv4.training.optim import MuonAdamW
from dsv4.training.schedule import Schedule

from .small_policy import TextProblems, has_f, small_policy

LOOP = LoopSettings(steps=3, schedule=Schedule(0.05, 0, 0.0), prompts=2, max_tokens=6, save_every=1)
SETTINGS = GRPORunSettings(
    LearnerSettings(GRPOSettings(kl=0.0)), RewardSettings(judge_cut_off=True), group_size=4, mini_batches=2
)


def make_run(run_dir: Path, loop: LoopSettings = LOOP, judged=has_f, settings=SETTINGS, kind="muon") -> GRPORun:
    policy, optimizer = small_policy()
    if kind != "muon":
        optimizer = OptimizerSection(kind=kind).optimizer(policy.model, policy.model.config)
    return GRPORun(policy, optimizer, TextProblems(judged), loop, settings, run_dir, quiet=True)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run: GRPORun) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}


def test_the_reward_rises_and_training_computes_what_the_engine_sampled(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, replace(LOOP, steps=16, prompts=4), settings=replace(SETTINGS, group_size=8, mini_batches=1)
    )
    run.run()
    lines = metrics(tmp_path)
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards
    differences = [line["train_serve_difference"] for line in lines if line["updates"]]
    assert differences
    if backends.native_module() is not None:
        assert max(differences) == 0.0


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    whole = make_run(tmp_path / "whole", kind=kind)
    assert bool(whole.optimizer.momenta()) == (kind == "muon")
    whole.run()
    for stop in (1, 2, None):  # a new process each time
        run = make_run(tmp_path / "parts", kind=kind)
        run.run(stop)
    assert run.position == replace(whole.position, seconds=run.position.seconds)
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(run).items())
    drop = {"seconds", "tokens_per_second", "sampling_seconds", "peak_memory_bytes"}
    assert [{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / "parts")] == [
        {k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / "whole")
    ]


def test_trained_tokens_are_those_that_the_updates_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all groups: prompts and answers of those that were learned from."""
    run = make_run(tmp_path, replace(LOOP, steps=2, prompts=3))
    seen: list[int] = []
    plain = run.policy.model.forward_ragged

    def noted(batch: RaggedBatch, *args: Any, **options: Any) -> Any:
        seen.append(batch.num_tokens)
        return plain(batch, *args, **options)

    monkeypatch.setattr(run.policy.model, "forward_ragged", noted)
    run.run()
    assert sum(line["trained_tokens"] for line in metrics(tmp_path)) == sum(seen) == tokens_of(tmp_path) > 0
    assert all(line["trained_tokens"] == 0 for line in metrics(tmp_path) if not line["updates"])


@pytest.mark.parametrize("number", range(1, 14))
@pytest.mark.parametrize("count", [1, 4, 7])
def test_mini_batches_are_as_many_as_asked_and_as_even_as_can_be(number: int, count: int) -> None:
    """Or as many as there are rollouts, if these are fewer."""
    parts = even_parts(range(number), count)
    assert [item for part in parts for item in part] == [*range(number)]
    sizes = [len(part) for part in parts]
    assert len(sizes) == min(count, number) and max(sizes) - min(sizes) <= 1


def test_a_step_has_as_many_updates_as_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rollouts in four: no cut into equal parts but the last gives four."""
    sizes: list[int] = []

    def noted(model: Any, optimizer: Any, batch: Any, *given: Any) -> Update:
        sizes.append(len(batch))
        return update(model, optimizer, batch, *given)

    monkeypatch.setattr(grpo_run, "update", noted)
    rewards = (Reward(float(place % 2), False) for place in range(100))
    monkeypatch.setattr(grpo_run, "judge", lambda rollouts, *_: [next(rewards) for _ in rollouts])
    make_run(tmp_path, replace(LOOP, steps=1), settings=replace(SETTINGS, group_size=5, mini_batches=4)).run()
    assert sorted(sizes) == [2, 2, 3, 3] and metrics(tmp_path)[0]["updates"] == 4


def test_frozen_mtp_blocks_change_no_bit_of_the_others(tmp_path: Path) -> None:
    one = replace(LOOP, steps=1)
    whole = make_run(tmp_path / "whole", one)
    policy, _ = small_policy()
    policy.model.mtp.requires_grad_(False)
    optimizer = MuonAdamW(policy.model, policy.model.config)
    frozen = GRPORun(policy, optimizer, TextProblems(has_f), one, SETTINGS, tmp_path / "frozen", quiet=True)
    before = weights(frozen)
    whole.run()
    frozen.run()
    for name, weight in weights(frozen).items():
        assert torch.equal(weight, before[name] if name.startswith("mtp.") else weights(whole)[name]), name


def test_the_recipe_trains_neither_routers_nor_mtp_blocks() -> None:
    model = make_policy(GRPORecipe(), nano_path()).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("mtp.") or name.endswith("gate.weight") for name in trained)


def test_equal_rewards_update_nothing_and_are_asked_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, replace(LOOP, steps=1), judged=lambda text: 1.0)
    before = weights(run)
    run.run()
    (line,) = metrics(tmp_path)
    assert (line["groups"], line["informative"], line["updates"]) == (6, 0, 0)
    assert all(torch.equal(p, before[name]) for name, p in weights(run).items())


def test_a_reward_that_raises_costs_its_rollouts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def judged(text: str) -> float:
        if "a" in text:
            raise ZeroDivisionError("no unit tests")
        return has_f(text)

    run = make_run(tmp_path, replace(LOOP, steps=2, prompts=4), judged)
    run.run()
    assert run.position.step == 2
    assert "the reward of letters raised ZeroDivisionError: no unit tests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the reward of letters is nan; allowed: a finite number"),
        (None, "the reward of letters raised TypeError: must be real number, not NoneType"),
    ],
)
def test_a_reward_that_is_no_number_is_named(
    value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, replace(LOOP, steps=1), lambda text: value)
    run.run()
    assert run.position.step == 1 and message in capsys.readouterr().out


def test_a_run_that_can_ask_nothing_stops(tmp_path: Path) -> None:
    """Each prompt is longer than the context: the run's model would be the one that it began with."""
    run = make_run(tmp_path)
    run.policy.set_options(max_model_len=2)
    with pytest.raises(
        UpdateError, match=r"all 24 rollouts of a step failed, the last with: the prompt of \d+ has 8 tokens"
    ):
        run.run()


def test_an_export_has_no_results_of_the_model_before_training(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    for name in (*TOKENIZER_FILES, "config.json", "results.json", "model.safetensors.index.json"):
        (start / name).write_text("{}")
    assert {path.name for path in tokenizer_files(start, tmp_path / "run").iterdir()} == {*TOKENIZER_FILES}


def test_a_kl_needs_a_reference(tmp_path: Path) -> None:
    settings = replace(SETTINGS, learner=LearnerSettings(GRPOSettings(kl=0.1)))
    with pytest.raises(ValueError, match=r"kl is 0\.1, but there is no reference policy"):
        make_run(tmp_path, settings=settings)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_kl_to_the_reference_starts_at_zero(
    quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL of each update: that of the first is of the weights that the reference has, as they are served."""
    export_model(small_policy()[0].model, tokenizer_files(nano_path(), tmp_path), tmp_path / "model")
    reference = load_model(tmp_path / "model")
    served = load_model(tmp_path / "model", weights="widened").requires_grad_()
    policy = ServedPolicy(served, nano_path(), quantized, max_num_seqs=16, max_model_len=256)
    settings = replace(SETTINGS, learner=LearnerSettings(GRPOSettings(kl=0.1), quantized=quantized))
    kls: list[float] = []

    def noted(*given: Any) -> Update:
        done = update(*given)
        kls.append(done.kl)
        return done

    monkeypatch.setattr(grpo_run, "update", noted)
    optimizer = MuonAdamW(served, served.config)
    GRPORun(policy, optimizer, TextProblems(has_f), LOOP, settings, tmp_path, reference, quiet=True).run()
    assert metrics(tmp_path)[0]["updates"] == 2
    assert kls[0] == 0.0 if backends.native_module() is not None else kls[0] < 1e-9
    assert min(kls[1:]) > 1e-6
