"""Scores of domains: right answers are counted, on the held-out split, the same for every call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4 import cli
from dsv4.config import nano_path
from dsv4.data.encoding import read_conversation
from dsv4.data.tasks import split_of
from dsv4.engine import LLM
from dsv4.evals import domain_scores
from dsv4.evals.domain_scores import DomainScore, evaluate_domain, held_out_problems
from dsv4.evals.effort_scores import evaluate_efforts, to_results
from dsv4.post_training.domains.solutions import solved
from dsv4.post_training.domains.tool_environment import ToolEnvironment
from dsv4.post_training.efforts import EffortMode, with_effort
from dsv4.post_training.episodes.environment import EpisodeProblem
from dsv4.post_training.episodes.sampling import continuation
from dsv4.post_training.problems import Explained
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.v4_recipe import CURVE
from dsv4.tokenizer.loss_mask import encode_training
from dsv4.tokenizer.prompts import write_effort_ladder
from tests.post_training.small_policy import small_policy


class ScriptedLLM(LLM):
    """An engine that answers each prompt with the tokens of a table, else with a dot."""

    def __init__(self, real: LLM, table: dict[tuple[int, ...], list[int]]) -> None:
        self.__dict__.update(real.__dict__)
        self.table = table
        self.asked: list[tuple[int, ...]] = []

    def generate(self, prompts, params=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        outputs = []
        for prompt in map(tuple, prompts):
            self.asked.append(prompt)
            assert self.tokenizer is not None
            ids = self.table.get(prompt) or [*self.tokenizer.encode("."), self.tokenizer.eos_token_id]
            one = SimpleNamespace(
                prompt_token_ids=prompt, token_ids=ids, logprobs=[0.0] * len(ids), finish_reason="stop",
                sampling_masks=[], routed_experts=None, indexer_topk=None,
            )  # fmt: skip
            outputs.append(SimpleNamespace(**vars(one), outputs=[one]))
        return outputs


@pytest.fixture(scope="module")
def llm() -> LLM:
    policy, _ = small_policy()
    policy.model.freeze()
    return LLM(policy.model, folder=policy._folder, max_num_seqs=16, max_model_len=2048)


def test_right_answers_are_counted(llm: LLM) -> None:
    assert llm.prompts is not None
    table: dict[tuple[int, ...], list[int]] = {}
    problems = held_out_problems("instructions", 20)
    for problem in problems[:13]:
        ids, _ = encode_training(llm.prompts, *read_conversation(solved(problem)))
        prompt = llm.prompts.encode(problem.prompt())
        table[tuple(prompt)] = ids[len(prompt) :]
    scripted = ScriptedLLM(llm, table)
    score = evaluate_domain(scripted, "instructions", 20)
    assert score.correct == 13 + sum(problem.reward(".") == 1.0 for problem in problems[13:])
    assert score.asked == 20
    assert len(scripted.asked) == len(set(scripted.asked)) == 20
    assert score.tokens == sum(map(len, table.values())) + 2 * 7
    low, high = score.interval
    assert low < score.rate < high and score.mean_tokens == score.tokens / 20


def test_episodes_are_followed_to_their_end(llm: LLM) -> None:
    assert llm.prompts is not None
    table: dict[tuple[int, ...], list[int]] = {}
    problems = held_out_problems("tools", 6)
    for problem in problems[:4]:
        record = solved(problem)
        prompt = llm.prompts.encode(problem.prompt())
        for number, message in enumerate(record["messages"]):
            if message["role"] != "assistant":
                continue
            turn = record | {"messages": record["messages"][: number + 1]}
            ids, _ = encode_training(llm.prompts, *read_conversation(turn))
            table[tuple(prompt)] = written = ids[len(prompt) :]
            if message.get("tool_calls"):
                result = record["messages"][number + 1]["content"]
                prompt = prompt + written + continuation(llm.prompts, [result], False)
    score = evaluate_domain(ScriptedLLM(llm, table), "tools", 6)
    assert (score.correct, score.asked) == (4, 6)


def test_answers_that_cannot_be_judged_are_said(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(self: ToolEnvironment, answer: str) -> Explained:
        raise OSError("no sandbox is left")

    monkeypatch.setattr(ToolEnvironment, "outcome", lost)
    monkeypatch.setattr("dsv4.notices._told", set())
    assert evaluate_domain(ScriptedLLM(llm, {}), "tools", 3).correct == 0
    (warning,) = caplog.messages
    assert "raised OSError: no sandbox is left; such answers of tools count as wrong" in warning


def test_a_model_answers_greedily_with_an_effort(llm: LLM) -> None:
    one, same = (
        evaluate_domain(llm, "mathematics", 3, thinking=True, efforts=("max",), max_tokens=4) for _ in range(2)
    )
    assert one == same == DomainScore(0, 3, 12)


def test_efforts_are_asked_in_turns(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(
        domain_scores, "_answers",
        lambda llm, problems, *_: asked.extend(problem.prompt().reasoning_effort for problem in problems) or [],
    )  # fmt: skip
    evaluate_domain(llm, "mathematics", 4, thinking=True, efforts=("low", "high", "max"))
    assert asked == ["low", "high", "max", "low"]


def test_problems_are_distinct_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = held_out_problems("mathematics", 60)
    assert len({problem.key for problem in problems}) == 60
    assert {split_of(problem.key) for problem in problems} == {"eval"}
    assert held_out_problems("mathematics", 10) == problems[:10]
    monkeypatch.setattr(domain_scores, "REPEATS", 1)
    assert len(held_out_problems("tools", 30, level="easy")) < 30


def test_an_effort_changes_the_prompt_alone() -> None:
    problem = held_out_problems("tools", 1, thinking=True)[0]
    asked = with_effort(problem, EffortMode("max"))
    prompt = asked.prompt()
    assert prompt.reasoning_effort == "max" and problem.prompt().reasoning_effort is None
    assert [tool.name for tool in prompt.tools] == [tool.name for tool in problem.prompt().tools]
    assert (asked.key, asked.domain, asked.thinking) == (problem.key, problem.domain, True)
    assert isinstance(asked, EpisodeProblem) and asked.environment() is not asked.environment()


def test_efforts_are_scored_on_the_same_problems(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, tuple[str, ...]]] = []

    def answers(llm, problems, max_tokens):
        asked.append((problems[0].prompt().reasoning_effort, tuple(problem.key for problem in problems)))
        rights = {"low": 1, "high": 2, "max": 2}[problems[0].mode.effort]
        yield (
            [
                Rollout(
                    place, (1,), (2,) * (3 * rights), (0.0,), f"</think>{problem.inner.example.answer}", place < rights
                )
                for place, problem in enumerate(problems)
            ],
            problems,
        )

    monkeypatch.setattr(domain_scores, "_answers", answers)
    scores = evaluate_efforts(llm, "mathematics", 4)
    assert [effort for effort, _ in asked] == ["low", "high", "max"] and len({keys for _, keys in asked}) == 1
    assert to_results(scores) == {
        "low": {"accuracy": 0.25, "tokens": 3.0},
        "high": {"accuracy": 0.5, "tokens": 6.0},
        "max": {"accuracy": 0.5, "tokens": 6.0},
    }


def test_an_effort_has_its_window(llm: LLM) -> None:
    scores = evaluate_efforts(llm, "mathematics", 3, max_tokens=9, efforts=("low", "max"), windows={"low": 2})
    assert scores["low"].mean_tokens <= 2 < scores["max"].mean_tokens


def test_the_curve_of_budgets_is_of_the_same_problems(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def answers(llm, problems, max_tokens):
        asked.append(tuple(problem.key for problem in problems))
        assert len({problem.mode.effort for problem in problems}) == 1
        assert all(f"Effort: {one.mode.effort} (" in one.prompt().messages[0].content for one in problems)
        tokens = (2,) * problems[0].mode.effort
        yield [Rollout(n, (1,), tokens, (0.0,), "</think>no", True) for n in range(len(problems))], problems

    monkeypatch.setattr(domain_scores, "_answers", answers)
    found = to_results(evaluate_efforts(llm, "mathematics", 4, efforts=CURVE))
    assert {name: one["tokens"] for name, one in found.items()} == {"1": 1, "25": 25, "50": 50, "75": 75, "100": 100}
    assert len(asked) == 5 and len({*asked}) == 1


def test_the_commands_write_and_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solved.jsonl"
    assert cli.main(["data", "solutions", "tools", "--count", "2", "--level", "easy", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 2 and all(record["tools"] for record in records)
    capsys.readouterr()
    keys = ["--domains", "mathematics", "--n", "2", "--efforts", "low", "max", "--max-tokens", "8", "--json"]
    assert cli.main(["eval", "domains", *keys]) == 0
    found = json.loads(capsys.readouterr().out)["scores"]
    assert [(one["effort"], one["asked"]) for one in found] == [("low", 2), ("max", 2)]
    april = shutil.copytree(nano_path(), tmp_path / "april")
    write_effort_ladder(april, "preview")
    same = ["eval", "domains", "--model", str(april), "--domains", "mathematics", "--efforts", "low", "high"]
    assert cli.main(same) == 2
    assert "efforts low and high have the same prompt under the ladder preview" in capsys.readouterr().err
    assert cli.main(["eval", "domains", "--domains", "mathematics", "--efforts", "25", "75"]) == 2
    assert "efforts are budgets, and the ladder of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["data", "solutions", "mathematics", "--efforts", "101", "--out", str(out)])
    assert "effort is '101'; allowed: low, high, max, a budget of 1 to 100" in capsys.readouterr().err
