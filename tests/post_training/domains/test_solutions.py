"""Solved problems: each is right by its own domain, of the training split, and read by fine-tuning as it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4.config import nano_path
from dsv4.data.encoding import read_conversation
from dsv4.data.records import find_sources
from dsv4.data.tasks import split_of
from dsv4.evals.domain_scores import held_out_problems
from dsv4.post_training.domains.domain import Level
from dsv4.post_training.domains.registry import DOMAINS, open_domain
from dsv4.post_training.domains.solutions import CHECK, length_weights, problem_to_solve, write_conversations
from dsv4.post_training.efforts import EffortMode, with_effort
from dsv4.post_training.episodes.environment import EpisodeProblem
from dsv4.post_training.sandbox.substrates import missing
from dsv4.post_training.sft_samples import Sample, read_samples
from dsv4.tokenizer.prompts import PromptEncoder

NEEDS_SANDBOX = {"code", "terminal"}


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return PromptEncoder.from_pretrained(nano_path())


def written(path: Path, domain: str, count: int, **options) -> list[dict]:
    write_conversations(domain, path, count, **options)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("level", ["standard", "easy"])
@pytest.mark.parametrize("domain", sorted(DOMAINS))
@pytest.mark.parametrize("thinking", [True, False])
def test_conversations_are_right_and_of_the_training_split(
    tmp_path: Path, prompts: PromptEncoder, domain: str, thinking: bool, level: Level
) -> None:
    if domain in NEEDS_SANDBOX and missing() is not None:
        pytest.skip(str(missing()))
    count = 6 if domain in NEEDS_SANDBOX else 40
    records = written(tmp_path / "talks.jsonl", domain, count, thinking=thinking, level=level)
    held_out = {one.key for one in held_out_problems(domain, 40, 1, thinking, level)}
    for number, record in enumerate(records):
        problem = problem_to_solve(open_domain(domain, thinking, level), 1, number)
        assert split_of(problem.key) == "train" and problem.key not in held_out
        last = record["messages"][-1]
        assert ("reasoning_content" in last) == thinking
        if not isinstance(problem, EpisodeProblem):
            assert problem.reward(last["content"]) == 1.0, record
            continue
        environment = problem.environment()  # the calls as written, once more
        results = iter([one["content"] for one in record["messages"] if one["role"] == "tool"])
        for call in [call for one in record["messages"] for call in one.get("tool_calls", ())]:
            arguments = json.loads(call["function"]["arguments"])
            assert environment.call(call["function"]["name"], arguments) == next(results)
        assert environment.outcome(last["content"]).value == 1.0
        environment.close()
    samples = list(read_samples(find_sources([str(tmp_path)]), prompts))
    assert len(samples) == len(records) and all(isinstance(sample, Sample) for sample in samples)


@pytest.mark.parametrize("ladder", ["preview", "0731", "scalar"])
def test_they_are_trained_on_as_they_are_asked(tmp_path: Path, prompts: PromptEncoder, ladder: str) -> None:
    """The prompt of fine-tuning has the tokens of the prompt of rollouts, with an effort and without."""
    prompts = PromptEncoder(prompts.tokenizer, ladder)
    cases = [("mathematics", ()), ("mathematics", ("low", "high", "max")), ("tools", ("max",))]
    cases += [("mathematics", ("1-100",)), ("tools", (7,))] if ladder == "scalar" else []
    for domain, efforts in cases:
        path = tmp_path / f"{ladder}-{domain}-{len(efforts)}.jsonl"
        for number, record in enumerate(written(path, domain, 20, thinking=True, efforts=efforts)):
            problem = problem_to_solve(open_domain(domain, True), 1, number)
            asked = with_effort(problem, EffortMode(record["reasoning_effort"])) if efforts else problem
            first = record | {"messages": record["messages"][:2]}
            assert prompts.encode(read_conversation(first)[0]) == prompts.encode(asked.prompt())


def test_more_effort_has_longer_reasoning(tmp_path: Path) -> None:
    records = written(tmp_path / "a.jsonl", "mathematics", 200, thinking=True, efforts=("low", "max"))
    written_by = {effort: [one for one in records if one["reasoning_effort"] == effort] for effort in ("low", "max")}
    low, most = (
        sum(len(one["messages"][-1]["reasoning_content"]) for one in found) / len(found)
        for found in written_by.values()
    )
    assert low < most
    found = {(one["reasoning_effort"], CHECK in one["messages"][-1]["reasoning_content"]) for one in records}
    assert found == {("low", False), ("max", True), ("max", False)}
    assert any("\n" in one["messages"][-1]["reasoning_content"] for one in written_by["low"])  # whole ones too
    assert records == written(tmp_path / "b.jsonl", "mathematics", 200, thinking=True, efforts=("low", "max"))


def test_larger_budgets_have_longer_reasoning_more_often(tmp_path: Path, prompts: PromptEncoder) -> None:
    records = written(tmp_path / "a.jsonl", "mathematics", 300, thinking=True, efforts=("1-100",))
    halves = [[one for one in records if (one["reasoning_effort"] > 50) == large] for large in (False, True)]
    small, large = (sum(len(one["messages"][-1]["reasoning_content"]) for one in half) / len(half) for half in halves)
    assert small < large and length_weights(1) == length_weights("low") and length_weights(100) == length_weights("max")
    refused = [one for one in read_samples(find_sources([str(tmp_path)]), prompts) if not isinstance(one, Sample)]
    assert len(refused) == 300 and "a number, and the model's ladder of efforts is 0731" in refused[0].reason


def test_runs_of_the_same_seed_ask_other_problems() -> None:
    domain = open_domain("tools")
    alike = sum(problem_to_solve(domain, 1, number).key == domain.problem(1, number).key for number in range(40))
    assert alike < 5  # some goals are drawn often


def test_an_unknown_domain_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown domain poetry; allowed: code"):
        write_conversations("poetry", tmp_path / "a.jsonl", 1)
    assert not list(tmp_path.iterdir())
