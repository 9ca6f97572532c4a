"""Problems from files of the user: prompts with an answer, unit tests or a rubric; and labelled judgements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Generic, TypeVar, cast

from deepseek_recipe import Conversation
from pydantic import BeforeValidator

from dsv4.data.encoding import check_effort, read_prompt
from dsv4.data.records import HUB_PREFIX, ROWS, RecordError, find_sources
from dsv4.data.stable_hash import stable_hash
from dsv4.notices import warn_once
from dsv4.post_training.answer_checks import CHECKS, Check, check_answer, check_available, check_schema
from dsv4.post_training.problems import Problem
from dsv4.post_training.rubric import DEFAULT_FORM, JudgeForm, JudgeQuestion, RubricQuestion
from dsv4.post_training.tested_problem import TestedProblem, check_sandbox, read_tests
from dsv4.text import check_text
from dsv4.tokenizer.prompts import Ladder

Files = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
SHOWN = 20  # refused rows of a call that are named one by one
P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class DataProblem:
    """A row's prompt; its reward is by the row's check, against its answer. Without an answer it has no reward."""

    domain: str
    key: str  # the row's place
    thinking: bool
    asked: Conversation = field(compare=False)
    answer: str | None = None
    check: Check = "exact"

    def prompt(self) -> Conversation:
        return self.asked

    def reward(self, answer: str) -> float:
        if self.answer is None:
            raise TypeError(f"{self.key} has no answer: it can be distilled on, not rewarded")
        return check_answer(self.check, self.answer, answer)


RowProblem = DataProblem | TestedProblem | RubricQuestion


@dataclass(frozen=True)
class Rows(Generic[P]):
    """Problems of rows, by number: every row once in each epoch, in an order of its own."""

    problems: tuple[P, ...]
    seed: int = 1

    def problem(self, number: int, /) -> P:
        epoch, place = divmod(number, len(self.problems))
        return self.problems[_order(self.seed, epoch, len(self.problems))[place]]


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> Sequence[int]:
    order = list(range(count))
    Random(stable_hash("rows", seed, epoch)).shuffle(order)
    return order


@dataclass(frozen=True)
class _Rules:
    """Rules by which rows are read; as of `read_problems`."""

    check: Check
    thinking: bool | None
    rewarded: bool
    ladder: Ladder | None
    partial: bool


def read_problems(
    files: Sequence[str],
    check: Check = "exact",
    thinking: bool | None = None,
    rewarded: bool = True,
    ladder: Ladder | None = None,
    partial: bool = False,
) -> tuple[RowProblem, ...]:
    """Problems of all rows that are some, in order; the others are named in warnings, with place and reason.

    A row has `messages` (or `prompt`), and `answer`, `tests` or `rubric`, which are not needed unless `rewarded`.
    `check` and `thinking` are of rows without their own; thinking is on without both. `ladder`: the model's, by which
    an effort may be a number; None: any. `partial`: the reward of tests is the share that pass. ValueError if no row is
    a problem, or if tests cannot be run here.
    """
    check_available(check)
    rules = _Rules(check, thinking, rewarded, ladder, partial)
    found = _problems(tuple(files), _stamps(files), rules)
    if rewarded and any(isinstance(problem, TestedProblem) for problem in found):
        check_sandbox()
    return found


def read_judgements(
    files: Sequence[str], thinking: bool = True, form: JudgeForm = DEFAULT_FORM
) -> tuple[JudgeQuestion, ...]:
    """Labelled judgements of all rows that are some, as of `read_problems`: `question`, `answer`, `label`, `rubric`."""
    return _read(files, lambda row, place: _judgement(row, place, thinking, form))


@functools.lru_cache(maxsize=4)
def _problems(files: Sequence[str], _: object, rules: _Rules) -> tuple[RowProblem, ...]:
    def read(row: dict[str, Any], place: str) -> RowProblem:
        problem = _problem(row, place, rules)
        if rules.ladder is not None:
            check_effort(row, rules.ladder)
        return problem

    return _read(files, read)


def _stamps(files: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Key that changes when files do: a run asks for their rows several times."""
    return tuple((name, Path(name).stat().st_mtime_ns if Path(name).exists() else 0) for name in files)


def digests(files: Iterable[str]) -> str:
    """A line for each file, with what changes when its rows do."""
    return "".join(f"{source.digest()} {source.name}\n" for source in find_sources(files, ROWS))


def absolute(files: Iterable[str]) -> tuple[str, ...]:
    """The same files from any folder."""
    return tuple(name if name.startswith(HUB_PREFIX) else str(Path(name).absolute()) for name in files)


def _read(files: Sequence[str], read: Callable[[dict[str, Any], str], P]) -> tuple[P, ...]:
    found: list[P] = []
    refused: list[str] = []
    for source in find_sources(files, ROWS):
        for entry in source.entries():
            row = entry.record
            if isinstance(row, RecordError):
                refused.append(str(row))
                continue
            try:
                values = {key: value for key, value in cast("dict[str, Any]", row).items() if value is not None}
                found.append(read(values, entry.place))
            except (ValueError, KeyError, TypeError) as error:  # a row may hold anything
                words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                refused.append(f"{entry.place}: {words}")
    more = f"{len(refused) - SHOWN} more rows of {', '.join(files)} are refused"
    if not found:
        first = refused[0] if refused else "there is none"
        raise ValueError(f"{', '.join(files)}: no row of {len(refused)} can be used; the first: {first}")
    for line in [f"refused: {one}" for one in refused[:SHOWN]] + [more] * (len(refused) > SHOWN):
        warn_once(line)
    return tuple(found)


def _problem(row: dict[str, Any], place: str, rules: _Rules) -> RowProblem:
    thinks = row.get("thinking", True) if rules.thinking is None else rules.thinking
    if not isinstance(thinks, bool):
        raise ValueError(f"thinking is {thinks!r}; allowed: true, false")
    domain, asked = _text(row, "domain", "data"), _asked(row, thinks)
    named = row.get("check", rules.check)
    if named not in CHECKS:
        raise ValueError(f"check is {named!r}; allowed: {', '.join(CHECKS)}")
    check_available(named)
    answer, rubric = _answer(row, named), _text(row, "rubric", "")
    if "tests" in row:
        if answer is not None or rubric:
            raise ValueError("tests beside an answer or a rubric; allowed: tests alone")
        return TestedProblem(domain, place, thinks, asked, read_tests(row["tests"]), rules.partial)
    if rubric:
        known = None if answer is None else functools.partial(check_answer, named, answer)
        return RubricQuestion(place, transcript(asked), rubric, domain, thinks, asked, known)
    if answer is None and rules.rewarded:
        raise ValueError("no answer, no tests and no rubric; allowed: one of them, or answer and rubric")
    return DataProblem(domain, place, thinks, asked, answer, named)


def _asked(row: dict[str, Any], thinking: bool) -> Conversation:
    """The row's conversation, which awaits an answer."""
    if ("messages" in row) == ("prompt" in row):
        found = "both messages and prompt" if "prompt" in row else f"neither messages nor prompt; it has {sorted(row)}"
        raise ValueError(f"{found}; allowed: one of them")
    messages = row.get("messages") or [{"role": "user", "content": _text(row, "prompt")}]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages is no list of objects with a role")
    last = cast("dict[str, Any]", messages[-1]).get("role")
    if last not in ("user", "tool"):
        raise ValueError(f"the last message is of {last!r}; allowed: user, tool, which await an answer")
    request = {key: row[key] for key in ("tools", "reasoning_effort") if key in row}
    return read_prompt(request | {"messages": messages}, thinking)


def _judgement(row: dict[str, Any], place: str, thinking: bool, form: JudgeForm) -> JudgeQuestion:
    label, labels = row.get("label"), {"good": form.max_score, "bad": 0}
    known = labels.get(label) if isinstance(label, str) else label
    if not isinstance(known, int) or isinstance(known, bool) or not 0 <= known <= form.max_score:
        raise ValueError(f"label is {label!r}; allowed: {', '.join(labels)}, 0 to {form.max_score}")
    good_or_bad = f"A good answer: {form.max_score}. A bad answer: 0."
    question, answer, rubric = _text(row, "question"), _text(row, "answer"), _text(row, "rubric", good_or_bad)
    return JudgeQuestion(place, question, answer, rubric, known, thinking=thinking, form=form)


def _answer(row: dict[str, Any], check: Check) -> str | None:
    answer = row.get("answer")
    if check == "schema" and answer is not None:
        return check_schema(answer)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    return None if answer is None else _text(row, "answer")


def _text(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None:
        raise ValueError(f"no {name}; it has {sorted(row)}")
    if not isinstance(value, str) or not (value.strip() or value == default):
        raise ValueError(f"{name} is {value!r}; allowed: a text that is not empty")
    check_text(value, name)
    return value


def transcript(asked: Conversation) -> str:
    """A conversation as a judge reads it: one message as it is, several with who says them."""
    said = [(type(message).__name__.removesuffix("Message"), str(message.content)) for message in asked.messages]
    return said[0][1] if len(said) == 1 else "\n\n".join(f"{who}:\n{text}" for who, text in said)
