"""On-policy distillation on small models: towards the teachers, still at them, resumable, by either estimate."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dsv4.config import nano_path
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.post_training import teachers as teachers_module
from dsv4.post_training.distillation import DistillationRun, DistillationSettings
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.sampling import sample_episodes
from dsv4.post_training.episodes.trajectory import Trajectory
from dsv4.post_training.policy_run import LoopSettings, PolicyPosition, StepFigures
from dsv4.post_training.recipes import DistillRecipe, GRPORecipe
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.teachers import Teacher, Teachers
from dsv4.post_training.updates import TrainServeError, UpdateError
from dsv4.post_training.v4_run import tokens_of
from dsv4.training.export import export_model
from dsv4.training.optim import MuonAdamW
from dsv4.training.recipe import read_recipe
from dsv4.training.schedule import Schedule
from dsv4.training.state import load_state

from .goals import Counted, roomy_policy, stopping
from .small_policy import TextProblem, has_f, small_policy

LOOP = LoopSettings(steps=3, schedule=Schedule(0.005, 0, 0.0), prompts=4, max_tokens=12, save_every=1)
SETTINGS = DistillationSettings(samples=2, balance=0.0, indexer=0.0, kl_chunk=7, micro_tokens=60)


class TwoDomains:
    """Problems of two domains in turn."""

    def problem(self, number: int, /) -> TextProblem:
        return TextProblem(number, has_f, domain=("numbers", "words")[number % 2])


def of_few_tokens(made: tuple[ServedPolicy, MuonAdamW]) -> tuple[ServedPolicy, MuonAdamW]:
    """The policy, which now samples some of a hundred tokens: with thousands alike, eight steps of the sampled estimate
    are noise."""
    with torch.no_grad():
        made[0].model.head.weight[300:400] *= 20.0
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student as it is, and two teachers that are surer of the same tokens."""
    found: dict[str, Path] = {}
    for number, name in enumerate(("student", "numbers", "words")):
        model = of_few_tokens(small_policy())[0].model
        with torch.no_grad():
            model.norm.weight.mul_((1.0, 6.0, 5.0)[number])  # surer of themselves
        found[name] = tmp_path_factory.mktemp("teachers") / name
        tokenizer = tmp_path_factory.mktemp("tokenizer")
        for file in nano_path().glob("*token*"):
            (tokenizer / file.name).write_bytes(file.read_bytes())
        export_model(model, tokenizer, found[name])
    return found


def make_run(
    run_dir: Path, folders: dict[str, Path], loop: LoopSettings = LOOP, settings: DistillationSettings = SETTINGS
) -> DistillationRun:
    policy, optimizer = of_few_tokens(small_policy())
    chosen = {name: Teacher(folders[name]) for name in folders if name != "student"}
    teachers = Teachers(chosen, run_dir / "hidden", policy.model.config.vocab_size)
    return DistillationRun(policy, optimizer, TwoDomains(), teachers, loop, settings, run_dir, quiet=True)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("estimate", ["full", "sampled"])
def test_the_student_approaches_both_teachers(estimate: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    settings = replace(SETTINGS, estimate=estimate)
    make_run(tmp_path, folders, replace(LOOP, steps=8), settings).run()
    lines = metrics(tmp_path)
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"], " ".join(f"{line['kl']:.3f}" for line in lines)
    assert set(lines[0]["kl_by_teacher"]) == {"numbers", "words"}
    if backends.native_module() is not None:
        assert max(line["train_serve_difference"] for line in lines) == 0.0


def test_teachers_are_hidden_states_and_one_head_each_with_its_weight(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers_module, "KEPT_BYTES", 0)
    run = make_run(tmp_path, folders, replace(LOOP, steps=1), replace(SETTINGS, micro_tokens=30))
    run.teachers.teachers["numbers"] = Teacher(folders["numbers"], 3.0)
    asked: list[str] = []
    made: list[weakref.ref[torch.Tensor]] = []
    plain = run.teachers.head

    def noted(domain: str) -> torch.Tensor:
        head = plain(domain)
        asked.append(domain)
        made.append(weakref.ref(head))
        assert len({id(one) for ref in made if (one := ref()) is not None}) == 1, "two heads are in memory"
        return head

    monkeypatch.setattr(run.teachers, "head", noted)
    run.run()
    assert len(asked) > 2 and asked == sorted(asked) and set(asked) == {"numbers", "words"}
    (line,) = metrics(tmp_path)
    kl, width = line["kl_by_teacher"], run.policy.model.config.hidden_size
    assert line["loss"] == pytest.approx(3.0 * kl["numbers"] + kl["words"], rel=1e-5)
    for domain in kl:
        with safe_open(tmp_path / "hidden" / f"{domain}.safetensors", "pt") as file:
            assert {file.get_slice(name).get_shape()[1] for name in file.keys()} == {width}  # noqa: SIM118


def test_small_teachers_are_loaded_once(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one after the other in each step; all values are the same."""
    loaded: list[weakref.ref[Transformer]] = []
    plain = teachers_module.load_frozen

    def noted(*arguments: Any) -> Transformer:
        assert many or not any(ref() is not None for ref in loaded), "two teachers are in memory"
        loaded.append(weakref.ref(model := plain(*arguments)))
        return model

    monkeypatch.setattr(teachers_module, "load_frozen", noted)
    found: list[tuple[int, list[float]]] = []
    for many in (True, False):
        monkeypatch.setattr(teachers_module, "KEPT_BYTES", 1 << 30 if many else 0)
        make_run(tmp_path / str(many), folders, replace(LOOP, steps=2)).run()
        found.append((len(loaded), [line["loss"] for line in metrics(tmp_path / str(many))]))
        gc.collect()
        loaded.clear()
    assert [count for count, _ in found] == [2, 4]
    assert found[0][1] == found[1][1]


def test_a_teacher_equal_to_the_student_moves_nothing(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The teacher's folder holds the stored values, with which the student's forward computes."""
    same = {"numbers": folders["student"], "words": folders["student"]}
    make_run(tmp_path, same, replace(LOOP, steps=1)).run()
    (line,) = metrics(tmp_path)
    if backends.native_module() is not None:
        assert line["kl"] == 0.0 and line["grad_norm"] == 0.0


def test_samples_may_be_drawn_at_another_temperature(tmp_path: Path, folders: dict[str, Path]) -> None:
    """KL is of the distributions at 1, and so are the log-probabilities, in the engine as in training."""
    one = replace(LOOP, steps=1)
    for temperature in (1.0, 0.3):
        settings = replace(SETTINGS, temperature=temperature)
        make_run(tmp_path / str(temperature), folders, one, settings).run()
    ((plain,), (cold,)) = (metrics(tmp_path / name) for name in ("1.0", "0.3"))
    assert cold["kl"] != plain["kl"] > 0.0
    if backends.native_module() is not None:
        assert cold["train_serve_difference"] == plain["train_serve_difference"] == 0.0
    keys = ['problems.tasks=["gcd"]', "sampling.temperature=0.3"]
    assert read_recipe(DistillRecipe, None, keys).settings().temperature == 0.3
    with pytest.raises(ValueError, match=r"temperature is 0.3 with the sampled estimate, .*; allowed: 1, or the full"):
        replace(SETTINGS, temperature=0.3, estimate="sampled")
    with pytest.raises(ValueError, match="temperature is 0.0; allowed: more than 0"):
        replace(SETTINGS, temperature=0.0)


def test_trained_tokens_are_those_that_the_student_saw(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, folders, replace(LOOP, steps=1))
    seen: list[int] = []
    plain = run.policy.model.forward_ragged

    def noted(batch: RaggedBatch, *args: Any, **options: Any) -> Any:
        seen.append(batch.num_tokens)
        return plain(batch, *args, **options)

    monkeypatch.setattr(run.policy.model, "forward_ragged", noted)
    run.run()
    (line,) = metrics(tmp_path)
    assert line["trained_tokens"] == sum(seen) == tokens_of(tmp_path) > line["tokens"]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, folders: dict[str, Path]) -> None:
    whole = make_run(tmp_path / "whole", folders)
    whole.run()
    for stop in (1, None):
        run = make_run(tmp_path / "parts", folders)
        run.run(stop)
    want = dict(whole.policy.model.named_parameters())
    assert all(torch.equal(p, want[name]) for name, p in run.policy.model.named_parameters())


def test_a_run_stops_where_training_and_engine_differ(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, folders, replace(LOOP, max_difference=0.1))
    differences = iter([0.1, 0.25])
    monkeypatch.setattr(run, "step", lambda rate: StepFigures({"train_serve_difference": next(differences)}, 1, 1))
    with pytest.raises(TrainServeError, match=r"of step 1 is 0.25; allowed by run.max_difference: 0.1 at most"):
        run.run()
    assert load_state(run.state_path, run.policy.model, run.optimizer, PolicyPosition).step == 1
    keys = ["run.max_difference=0", 'problems.tasks=["gcd"]']
    assert read_recipe(DistillRecipe, None, keys).loop().max_difference == 0.0
    with pytest.raises(ValueError, match="run.max_difference is 0 and service.max_staleness 1; allowed: one of them"):
        read_recipe(GRPORecipe, None, [*keys, "service.max_staleness=1", "service.workers=1"])


def test_a_domain_without_a_teacher_is_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    run = make_run(tmp_path, {"numbers": folders["numbers"]})
    with pytest.raises(ValueError, match="no teacher for problems of words; there are numbers"):
        run.run()
    make_run(tmp_path, {"numbers": folders["numbers"], "default": folders["words"]}, replace(LOOP, steps=1)).run()


def test_another_vocabulary_is_an_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="the student of 77; allowed: the same tokenizer"):
        Teachers({"default": Teacher(folders["words"])}, tmp_path, 77)


class Goals:
    """Goals that the random policy reaches with a digit; number 1 loses its environment."""

    def problem(self, number: int, /) -> Counted:
        return Counted(number, [], fails=number == 1)


@pytest.mark.usefixtures("chatty")
def test_whole_episodes_are_distilled_on_their_sampled_tokens(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, optimizer = of_few_tokens(roomy_policy())
    vocab = policy.model.config.vocab_size
    asked: list[list[Trajectory]] = []

    def noted(*arguments: Any) -> list[Any]:
        asked.append(sample_episodes(*arguments))
        return list(asked[-1])

    monkeypatch.setattr("dsv4.post_training.distillation.SamplingParams", lambda **_: stopping(vocab))
    monkeypatch.setattr("dsv4.post_training.asking.sample_episodes", noted)
    settings = replace(SETTINGS, micro_tokens=2000, episodes=EpisodeLimits(turns=3))
    teachers = Teachers({"default": Teacher(folders["student"])}, tmp_path / "hidden", vocab)
    run = DistillationRun(policy, optimizer, Goals(), teachers, replace(LOOP, steps=1), settings, tmp_path, quiet=True)
    run.run()
    (line,) = metrics(tmp_path)
    (episodes,) = asked
    assert any(one.error for one in episodes) and max(one.turns for one in episodes) > 1
    kept = [one for one in episodes if one.error is None]
    assert line["answer_tokens"] * len(episodes) == sum(one.num_tokens for one in kept)
    assert not list((tmp_path / "episodes").iterdir())
    if backends.native_module() is not None:
        assert line["kl"] == line["grad_norm"] == line["train_serve_difference"] == 0.0


def test_a_step_without_any_sample_says_why(tmp_path: Path, folders: dict[str, Path]) -> None:
    run = make_run(tmp_path, folders)
    lost = SimpleNamespace(error="the environment raised OSError", num_tokens=3)
    with pytest.raises(UpdateError, match="all 1 samples failed, the last with: the environment raised OSError"):
        run.by_domain([lost], [])  # pyright: ignore
