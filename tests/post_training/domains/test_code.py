"""Problems of the domain code: pure, split, solved by their references; hostile answers cost nothing but the reward."""

from __future__ import annotations

from random import Random

import pytest

from dsv4.data.tasks import Split, split_of
from dsv4.post_training import program_tests
from dsv4.post_training.domains import code
from dsv4.post_training.domains.code import Code, CodeProblem
from dsv4.post_training.domains.programs import Program
from dsv4.post_training.domains.registry import DomainProblems
from dsv4.post_training.problem_keys import ProblemsSection
from dsv4.post_training.rewards import RewardSettings, judge
from dsv4.post_training.rollouts import Rollout
from dsv4.post_training.sandbox.substrates import missing

needs_sandbox = pytest.mark.skipif(missing("namespaces") is not None, reason=str(missing("namespaces")))


def problem(number: int, split: Split = "train") -> CodeProblem:
    found = Code().problem(1, number, split)
    assert isinstance(found, CodeProblem)
    return found


def test_problems_are_pure_and_splits_share_no_key() -> None:
    train, evaluated = ([problem(n, split) for n in range(150)] for split in ("train", "eval"))
    assert train[:20] == [problem(n) for n in range(20)]
    assert {split_of(one.key) for one in train} == {"train"} and {split_of(one.key) for one in evaluated} == {"eval"}
    assert not {one.key for one in train} & {one.key for one in evaluated}
    assert len({one.key for one in train}) > 100


def test_programs_that_do_the_same_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that commute, sums in another form: else one of a pair may be held out, the other trained on."""

    def key(arguments: tuple[str, ...], expression: str) -> str:
        program = Program(arguments, expression, expression)
        monkeypatch.setattr(code, "draw_program", lambda _: program)
        found = Code().draw(Random(1))
        assert found is not None
        return found.key

    pairs = [
        (("s",), "s.upper()[::-1]", "s[::-1].upper()"),
        (("s",), "len(s[::-1].split())", "len(s.split())"),
        (("a",), "(a + 3) * 4", "a * 4 + 12"),
        (("a", "b"), "max(a, b) + 2", "max(b, a) + 2"),
        (("xs",), "[x * 3 for x in xs][:2]", "[x * 3 for x in xs[:2]]"),
        (("xs",), "sum(xs)", "sum(reversed(xs))"),
    ]
    for arguments, one, other in pairs:
        assert key(arguments, one) == key(arguments, other), (one, other)
    assert len({key(arguments, one) for arguments, one, _ in pairs}) == len(pairs)
    assert key(("a",), "a > 20") != key(("a",), "a > 21")


def test_references_return_what_the_tests_expect() -> None:
    for number in range(150):
        one = problem(number)
        names: dict = {}
        exec(one.solution, names)
        for test in one.tests:
            value = names[test.function](*test.arguments)
            assert type(value) is type(test.expected) and value == test.expected, one.question


@needs_sandbox
def test_rewards_and_reasons() -> None:
    one = problem(0)
    name = one.tests[0].function
    answers = {
        f"Here:\n```python\n{one.solution}```": (1.0, "all tests pass"),
        one.solution: (1.0, "all tests pass"),
        "def f(:": (0.0, "SyntaxError"),
        f"def {name}(*_):\n    return None": (0.0, "wrong answer"),
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)": (0.0, ""),
        "\ud800": (0.0, ""),
        "": (0.0, "no program"),
        "x" * 30_000: (0.0, "30000 characters"),
    }
    for answer, (value, reason) in answers.items():
        found = one.explain(answer)
        assert found.value == value and reason in found.reason, (answer, found)


@needs_sandbox
def test_a_hung_program_has_reward_0_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_tests, "SECONDS", 0.5)
    one = problem(3)
    texts = ["while True: pass", one.solution]
    rollouts = [Rollout(0, (1,), (2,), (0.0,), text, True) for text in texts]
    hung, right = judge(rollouts, [one], RewardSettings())
    assert (hung.value, hung.error) == (0.0, None) and "no answer within" in hung.reason
    assert right.value == 1.0 and right.correct


def test_a_missing_sandbox_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "missing", lambda *_: "bubblewrap is not installed")
    with pytest.raises(ValueError, match="domain code .* bubblewrap is not installed"):
        ProblemsSection(domains=("code",)).source()


@needs_sandbox
def test_recipes_name_domains_and_tasks() -> None:
    mixed = ProblemsSection(tasks=("gcd",), domains=("code",)).source()
    assert {mixed.problem(n).domain for n in range(30)} == {"gcd", "code"}
    assert ProblemsSection(domains=("code",), thinking=True).source().problem(1).thinking
    assert ProblemsSection(domains=("code",)).source() == DomainProblems({"code": 1.0})
    with pytest.raises(ValueError, match="unknown domain cod; allowed: .*code"):
        ProblemsSection(domains=("cod",)).source()
    with pytest.raises(ValueError, match="2 weights for 1 domains"):
        ProblemsSection(domains=("code",), domain_weights=(1.0, 2.0))
