"""Episodes: sampled tokens stay, training has the sampler's bits over all turns, arrays go after use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_recipe import AssistantMessage, Conversation, ToolCall, ToolMessage, UserMessage

from dsv4.config import nano_path
from dsv4.data.tasks import split_of
from dsv4.engine import SamplingParams
from dsv4.engine.outputs import RequestOutput
from dsv4.kernels import backends
from dsv4.model.batch import RaggedBatch
from dsv4.model.choices import ChoiceNotes
from dsv4.post_training.domains.agent import Terminal, ToolProblem, Tools
from dsv4.post_training.domains.tool_environment import TOOLS, Goal, ShellEnvironment, calculate
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.sampling import UNREADABLE, continuation, sample_episodes
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.grpo import GRPOSettings
from dsv4.post_training.grpo_run import GRPORun, GRPORunSettings
from dsv4.post_training.learner import LearnerSettings
from dsv4.post_training.policy_run import LoopSettings
from dsv4.post_training.problems import Explained
from dsv4.post_training.replay import ReplaySettings, replaying
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import answer_log_probabilities
from dsv4.post_training.sandbox.substrates import missing
from dsv4.tokenizer.prompts import PromptEncoder
from dsv4.training.qat import stored_weights
from dsv4.training.schedule import Schedule
from tests.post_training.sandbox.conftest import lose

from .goals import PARAMS, Counted, roomy_policy, stopping

needs_sandbox = pytest.mark.skipif(missing("namespaces") is not None, reason=str(missing("namespaces")))


class Scripted:
    """An engine that says scripted turns."""

    max_model_len = 2048

    def __init__(self, turns: list[list[int]]) -> None:
        self.prompts = PromptEncoder.from_pretrained(nano_path())
        self.tokenizer, self.config = self.prompts.tokenizer, SimpleNamespace(eos_token_ids=(1,))
        self.turns, self.seen = turns, list[list[int]]()

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        self.seen += prompts
        turn = self.turns[len(self.seen) - 1]
        return [RequestOutput(prompts[0], turn, logprobs=[-0.5] * len(turn), finish_reason="stop")]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of a text that begins with $ runs it in the shell; any other is the answer."""

    def calls(text: str) -> list[dict[str, Any]]:
        return [{"name": "run", "arguments": {"command": text[1:]}}] if text.startswith("$") else []

    monkeypatch.setattr("dsv4.data.tasks.parse_tool_calls", calls)


def typed_turns(*texts: str) -> list[list[int]]:
    tokenizer = PromptEncoder.from_pretrained(nano_path()).tokenizer
    return [[*tokenizer.encode(text), 1] for text in texts]


@pytest.mark.parametrize("thinking", [False, True])
def test_tokens_are_those_of_the_conversation_and_the_goal_is_checked(tmp_path: Path, thinking: bool) -> None:
    goal = Goal(keys={"pens": "42"}, answer="done")
    problem = ToolProblem("Set the key pens to 6 * 7.", goal, {}, {}, "tools", thinking=thinking)
    prompts = PromptEncoder.from_pretrained(nano_path())
    steps = [("calculate", {"expression": "6 * 7"}, "42"), ("set", {"key": "pens", "value": "42"}, "ok")]
    messages, turns, after = [UserMessage(problem.question)], [], []
    for place, (name, arguments, result) in enumerate(steps):
        before = prompts.encode(Conversation(messages, thinking_mode=thinking, tools=list(TOOLS)))
        call = ToolCall(str(place), name, json.dumps(arguments))
        messages += [AssistantMessage("", "so" if thinking else None, [call]), ToolMessage(result, call.id)]
        after = prompts.encode(Conversation(messages, thinking_mode=thinking, tools=list(TOOLS)))
        between = continuation(prompts, [result], thinking)
        assert after[: len(before)] == before and after[-len(between) :] == between
        turns.append(after[len(before) : -len(between)])
    last = prompts.tokenizer.encode("done")
    think_end = prompts.encode(Conversation([UserMessage("x")], thinking_mode=False))[-1:]
    llm = Scripted([*turns, [*(think_end if thinking else []), *last, 1]])
    (found,) = sample_episodes(llm, [(3, problem)], 1, PARAMS, 1, EpisodeLimits(), TrajectoryFiles(tmp_path / "e"))  # pyright: ignore
    assert found.finished and (found.prompt, found.turns, found.calls, found.error) == (3, 3, 2, None)
    assert found.outcome == Explained(1.0, "the goal is reached")
    assert found.document == after + llm.turns[-1]
    assert found.token_ids == [token for turn in llm.turns for token in turn]
    assert found.num_tokens == len(found.token_ids) == len(found.log_probabilities)
    assert [llm.seen[n + 1][: len(llm.seen[n])] == llm.seen[n] for n in range(2)] == [True, True]
    (reward,) = judge([found], {3: problem}, RewardSettings())  # pyright: ignore
    assert (reward.value, reward.correct) == (1.0, True)


@pytest.mark.usefixtures("chatty")
def test_training_has_the_samplers_bits_over_whole_episodes(tmp_path: Path) -> None:
    policy, _ = roomy_policy()
    log: list[str] = []
    goals = [(place, Counted(place, log)) for place in range(3)]
    params = stopping(policy.model.config.vocab_size)
    limits = EpisodeLimits(turns=4, tokens=40, at_once=4)
    with policy.serving() as llm:
        found = sample_episodes(llm, goals, 3, params, 1, limits, TrajectoryFiles(tmp_path / "a"))
        again = sample_episodes(llm, goals, 3, params, 1, replace(limits, at_once=2), TrajectoryFiles(tmp_path / "b"))
    assert log.count("open") == log.count("close") == 18
    assert [one.prompt for one in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [one.document for one in found] == [one.document for one in again]  # however many run at once
    assert max(one.turns for one in found) > 1 and all(one.num_tokens <= 40 for one in found)
    if backends.native_module() is not None:
        with stored_weights(policy.model, indexers=False):
            log_p = answer_log_probabilities(policy.model, found)
        assert log_p.requires_grad
        assert torch.equal(log_p.detach(), torch.tensor([x for one in found for x in one.log_probabilities]))
    assert not any(one.sampling_masks for one in found) and {one.choices for one in found} == {None}
    found[0].release()
    found[0].release()
    assert not found[0].streams.folder.exists() and found[0].num_tokens > 0


@pytest.mark.usefixtures("chatty")
def test_episodes_have_the_masks_and_choices_of_all_their_turns(tmp_path: Path) -> None:
    policy, _ = roomy_policy()
    policy.set_options(enable_return_routed_experts=True, enable_return_indexer_topk=True)
    params = replace(
        stopping(policy.model.config.vocab_size), temperature=0.8, top_k=9, logprobs_mode="processed_logprobs"
    )
    goals = [(place, Counted(place, [])) for place in range(2)]
    with policy.serving() as llm:
        found = sample_episodes(llm, goals, 2, params, 1, EpisodeLimits(turns=3), TrajectoryFiles(tmp_path / "a"))
        model = policy.model
        for one in found:
            notes = ChoiceNotes.of(model.config, one.num_document, model.device)
            model.next_token_logits(RaggedBatch.pack([one.document]), notes=notes)
            want, got = notes.choices()[:-1], one.choices
            assert got is not None and np.array_equal(got.experts, want.experts)  # pyright: ignore[reportArgumentType]
            assert np.array_equal(got.entries, want.entries)  # pyright: ignore[reportArgumentType]
    assert max(one.turns for one in found) > 1
    for one in found:
        masks = [np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little") for mask in one.sampling_masks]
        assert one.temperature == 0.8 and len(masks) == one.num_tokens and {mask.sum() for mask in masks} == {9}
        assert all(mask[token] for mask, token in zip(masks, one.token_ids, strict=True))
    if backends.native_module() is not None:
        aux = replaying(found, policy.model)
        with stored_weights(policy.model, indexers=False):
            log_p = answer_log_probabilities(policy.model, found, aux=aux)
        assert (aux.expert_differences, aux.entry_differences) == (0, 0)
        assert torch.equal(log_p.detach(), torch.tensor([x for one in found for x in one.log_probabilities]))


@pytest.mark.usefixtures("chatty")
def test_groups_of_episodes_train_and_leave_no_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, optimizer = roomy_policy()
    log: list[str] = []
    goals: Any = SimpleNamespace(problem=lambda number: Counted(number, log, fails=number == 1))
    loop = LoopSettings(steps=2, schedule=Schedule(0.01, 0, 0.0), prompts=3, max_tokens=12, save_every=2)
    limits = EpisodeLimits(turns=3)
    params = replace(stopping(policy.model.config.vocab_size), temperature=0.9, top_p=0.95)
    settings = GRPORunSettings(
        LearnerSettings(GRPOSettings(kl=0.0)), RewardSettings(), group_size=4, mini_batches=2, resample=2,
        sampling=params, replay=ReplaySettings(routing=True, indexer=True), episodes=limits,
    )  # fmt: skip
    run = GRPORun(policy, optimizer, goals, loop, settings, tmp_path, quiet=True)
    run.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and sum(line["updates"] for line in lines) > 0
    if backends.native_module() is not None:
        assert {line["train_serve_difference"] for line in lines if line["updates"]} == {0.0}
        assert {line["routing_differences"] for line in lines if line["updates"]} == {0}
        assert {line["indexer_differences"] for line in lines if line["updates"]} == {0}
    assert log.count("open") == log.count("close") and not list((tmp_path / "episodes").iterdir())


def test_unreadable_calls_are_answered_in_words() -> None:
    prompts = PromptEncoder.from_pretrained(nano_path())
    assert UNREADABLE in prompts.tokenizer.decode(continuation(prompts, None, False))


def test_goals_are_pure_split_and_not_reached_by_doing_nothing() -> None:
    for domain in (Tools(), Terminal()):
        for split in ("train", "eval"):
            problems = [domain.problem(1, number, split) for number in range(60)]
            assert {split_of(one.key) for one in problems} == {split}
            assert all(one.reward("") == 0.0 for one in problems)
        assert domain.problem(1, 5) == domain.problem(1, 5)


def test_tools_answer_mistakes_in_words() -> None:
    environment = ToolProblem("", Goal(), {"a": "text"}, {"k": "1"}, "tools").environment()
    assert environment.call("read_file", {"name": "a"}) == "text"
    assert environment.call("read_file", {"file": "a"}) == "read_file takes name"
    assert environment.call("fly", {}) == "no tool fly"
    assert environment.call("get", {"key": "x"}) == "no key x"
    assert environment.call("write_file", {"name": "b", "text": "x" * 5000}).startswith("refused")
    assert [calculate(text) for text in ("(1 + 2) * 3", "7 / 2", "-4")] == ["9", "3.5", "-4"]
    for text in ("9 ** 9", "1 / 0", "x", "", "1e999", "(" * 300, "__import__('os')", "999999999999 * 9"):
        assert calculate(text).startswith("cannot be calculated"), text


def test_a_result_that_has_no_tokens_is_told_in_its_escapes(tmp_path: Path) -> None:
    """Half of a surrogate pair in an argument comes back in the tool's words."""
    call = '<｜DSML｜parameter name="key" string="false">"\\ud800"</｜DSML｜parameter>'
    block = f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get">\n{call}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    problem = ToolProblem("Get it.", Goal(answer="done"), {}, {}, "tools")
    llm = Scripted(typed_turns(block, "done"))
    (found,) = sample_episodes(llm, [(0, problem)], 1, PARAMS, 1, EpisodeLimits(), TrajectoryFiles(tmp_path / "e"))  # pyright: ignore
    assert "no key \\ud800" in llm.tokenizer.decode(found.document)
    assert found.error is None and found.outcome is not None and found.outcome.value == 1.0


@needs_sandbox
def test_the_shell_is_a_sandbox() -> None:
    environment = ShellEnvironment(Goal(files={"b.txt": "a\nb"}), {"a.txt": "b\na\n"})
    assert environment.outcome("").value == 0.0
    assert "exit code 1" in environment.call("run", {"command": "exit 1"})
    environment.call("run", {"command": "sort a.txt > b.txt"})
    assert environment.outcome("").value == 1.0
    environment.close()


@needs_sandbox
@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize("when", ["before the goal is looked at", "before a call"])
def test_an_episode_whose_sandbox_is_lost_is_left_out(tmp_path: Path, when: str) -> None:
    """It may have reached its goal: a reward of 0 would be learned from."""
    opened: list[ShellEnvironment] = []

    class Losing(Scripted):
        def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
            if len(self.seen) == len(self.turns) - (1 if when.startswith("before the goal") else 2):
                lose(opened[0]._sandbox)  # type: ignore[arg-type]  # pyright: ignore
            return super().generate(prompts, params)

    goal = Goal(files={"a.txt": "a"})
    problem = SimpleNamespace(
        key="x", domain="terminal", thinking=False, reward=lambda answer: 0.0,
        prompt=ToolProblem("Write a", goal, {}, {}, "terminal", shell=True).prompt,
        environment=lambda: opened.append(ShellEnvironment(goal, {})) or opened[0],
    )  # fmt: skip
    llm = Losing(typed_turns("$ echo a > a.txt", "$ true", "Done."))
    (found,) = sample_episodes(llm, [(0, problem)], 1, PARAMS, 1, EpisodeLimits(), TrajectoryFiles(tmp_path / "e"))  # pyright: ignore
    (reward,) = judge([found], [problem])  # type: ignore[list-item]  # pyright: ignore
    assert reward.error is not None and "terminal raised SandboxError: the sandbox was lost" in reward.error
