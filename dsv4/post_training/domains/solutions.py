"""Solved problems of the domains as conversations in OpenAI's message format, to be fine-tuned on.

Answers and reasoning are the problems' own; the results of tool calls come from the problem's environment. Under
efforts the reasoning has one of LENGTHS, drawn by the effort's weights: each effort has two of them, so that
reinforcement learning can choose, and low the last line often, so that efforts differ from the start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from deepseek_recipe import Message, ToolDefinition

from dsv4.checkpoint.atomic import new_file
from dsv4.data.stable_hash import stable_hash
from dsv4.post_training.domains.agent import ToolProblem
from dsv4.post_training.domains.code import CodeProblem
from dsv4.post_training.domains.domain import Domain, Level
from dsv4.post_training.domains.instructions import Instructions
from dsv4.post_training.domains.mathematics import MathProblem
from dsv4.post_training.domains.registry import open_domain
from dsv4.post_training.effort_names import Asked, asked_efforts
from dsv4.post_training.problems import Problem
from dsv4.tokenizer.effort_number import MAX_BUDGET, MIN_BUDGET

Length = Literal["brief", "steps", "checked"]
LENGTHS: tuple[Length, ...] = ("brief", "steps", "checked")
WEIGHTS = {"low": (6.0, 4.0, 0.0), "high": (1.0, 9.0, 0.0), "max": (0.0, 9.0, 1.0)}  # of LENGTHS
CHECK = "check"


def write_conversations(
    domain: str,
    path: Path,
    count: int,
    seed: int = 1,
    thinking: bool | None = None,
    efforts: Sequence[str | int] = (),
    level: Level = "standard",
) -> None:
    """Write `count` solved problems of a domain's training split to `path`, a conversation per line.

    `thinking` None leaves the mode to the problems. `efforts`: drawn for those that think; none: as the problem has it.
    ValueError for an unknown domain, or one that lacks what it needs.
    """
    opened = open_domain(domain, thinking, level)
    opened.prepare()
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number in range(count):
            rng = Random(stable_hash("solution", domain, seed, number))
            problem = problem_to_solve(opened, seed, number)
            effort, length = None, LENGTHS[1]
            if efforts and problem.thinking:
                effort = rng.choice(asked_efforts(efforts))
                length = rng.choices(LENGTHS, length_weights(effort))[0]
            file.write(json.dumps(solved(problem, effort, length)) + "\n")


def length_weights(effort: Asked) -> tuple[float, float, float]:
    """Weights of LENGTHS; those of budgets go from low's at the smallest to max's at the largest."""
    if not isinstance(effort, int):
        return WEIGHTS[effort]
    share = (effort - MIN_BUDGET) / (MAX_BUDGET - MIN_BUDGET)
    brief, steps, checked = (
        low + share * (most - low) for low, most in zip(WEIGHTS["low"], WEIGHTS["max"], strict=True)
    )
    return brief, steps, checked


def problem_to_solve(domain: Domain, seed: int, number: int) -> Problem:
    """A problem of the training split: another one than runs with this seed ask under this number, so that
    reinforcement learning does not begin with the problems whose solutions were fine-tuned on."""
    return domain.problem(stable_hash("solutions", seed), number)


def solved(problem: Problem, effort: Asked | None = None, length: Length = "steps") -> dict[str, Any]:
    """A problem and its right answer. `effort` None: the prompt's own. ValueError for one without a solution."""
    prompt = problem.prompt()
    record: dict[str, Any] = {"messages": [_prompt_message(message) for message in prompt.messages]}
    record["messages"] += _assistant(problem, length)
    if prompt.tools:
        record["tools"] = [_tool(tool) for tool in prompt.tools]
    if problem.thinking:
        record["reasoning_effort"] = effort or prompt.reasoning_effort or "low"
    return record


def _assistant(problem: Problem, length: Length) -> list[dict[str, Any]]:
    """The turns of the assistant and the results between them."""
    if isinstance(problem, ToolProblem):
        return _episode(problem)
    if isinstance(problem, MathProblem):
        answer, reasoning = problem.example.answer, problem.example.reasoning
    elif isinstance(problem, CodeProblem):
        answer, reasoning = f"```python\n{problem.solution}```", problem.reasoning
    elif isinstance(problem, Instructions):
        answer, reasoning = problem.solution, problem.reasoning
    else:
        raise ValueError(f"{problem.key!r} of {problem.domain} has no solution to write")
    return [_turn(problem, answer, _of_length(reasoning, length))]


def _of_length(reasoning: str, length: Length) -> str:
    """Reasoning as it is, its last line alone, or twice."""
    if length == "checked":
        return f"{reasoning}\n{CHECK}\n{reasoning}"
    return reasoning.rpartition("\n")[2] if length == "brief" else reasoning


def _episode(problem: ToolProblem) -> list[dict[str, Any]]:
    """The problem's steps, each a turn with one call and its result, and the answer."""
    environment = problem.environment()
    turns: list[dict[str, Any]] = []
    try:
        for number, step in enumerate(problem.steps):
            function = {"name": step.name, "arguments": json.dumps(step.arguments)}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            turns.append(_turn(problem, "", step.why) | {"tool_calls": [call]})
            result = environment.call(step.name, step.arguments)
            turns.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        outcome = environment.outcome(problem.answer)
    finally:
        environment.close()
    assert outcome.value == 1.0, f"{problem.question}: {outcome.reason}"
    return [*turns, _turn(problem, problem.answer, "the goal is reached")]


def _turn(problem: Problem, content: str, reasoning: str) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content}
    return turn | {"reasoning_content": reasoning} if problem.thinking else turn


def _prompt_message(message: Message) -> dict[str, Any]:
    if message.role not in ("system", "user"):
        raise ValueError(f"a prompt has a message of {message.role}; allowed: system and user")
    return {"role": message.role, "content": message.content}


def _tool(tool: ToolDefinition) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
