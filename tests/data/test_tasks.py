import dataclasses
import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from random import Random

import pytest
from reasoning_gym.algebra.simple_equations import SimpleEquationsConfig, SimpleEquationsDataset

from dsv4.data.stable_hash import stable_hash
from dsv4.data.tasks import TASKS, GymTask, parse_tool_calls, split_of
from dsv4.data.tasks.arithmetic import BasicArithmetic, ChainSum, FastSimpleEquations, SimpleEquations
from dsv4.data.tasks.base import Example
from dsv4.data.tasks.mathematics import reproducibly

NAMES = sorted(TASKS)
GYM = sorted(name for name, task in TASKS.items() if isinstance(task, GymTask))


def call_text(example: Example) -> str:
    """Render an example's calls as the template does."""
    lines = ["\n\n<｜DSML｜tool_calls>"]
    for call in example.tool_calls:
        lines.append(f'<｜DSML｜invoke name="{call["name"]}">')
        for key, value in call["arguments"].items():
            text, flag = (value, "true") if isinstance(value, str) else (json.dumps(value), "false")
            lines.append(f'<｜DSML｜parameter name="{key}" string="{flag}">{text}</｜DSML｜parameter>')
        lines.append("</｜DSML｜invoke>")
    return "\n".join([*lines, "</｜DSML｜tool_calls>"])


def written(example: Example) -> str:
    """Text of a right answer."""
    return call_text(example) if example.tool_calls else example.answer


def test_the_eight_required_tasks_of_the_gym_exist() -> None:
    asked = (
        "chain_sum basic_arithmetic number_sorting letter_counting spell_backward gcd simple_equations needle_haystack"
    )
    assert set(asked.split()) <= set(GYM) and len(GYM) >= 8
    assert all(task.difficulty for task in TASKS.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_function_of_task_seed_and_split(name: str) -> None:
    task = TASKS[name]
    first = [task.sample(seed, "train") for seed in range(20)]
    assert [task.sample(seed, "train") for seed in reversed(range(20))] == first[::-1]
    assert len({example.key for example in first}) > 10


def test_threads_that_draw_from_the_global_generators_wait_for_each_other() -> None:
    """Those that ask problems ahead of a step do: a problem is a function of its number all the same."""

    def draw() -> tuple[float, float]:
        first = random.random()
        time.sleep(0.01)
        return first, random.random()

    want = [reproducibly(draw, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda seed: reproducibly(draw, seed), range(8))) == want


def test_examples_are_the_same_in_another_process() -> None:
    code = "from dsv4.data.tasks import TASKS; print([t.sample(3).key for t in TASKS.values()])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str([task.sample(3).key for task in TASKS.values()])


@pytest.mark.parametrize("name", NAMES)
def test_no_evaluation_question_is_a_training_question(name: str) -> None:
    task = TASKS[name]
    train = {task.sample(seed, "train").key for seed in range(300)}
    evaluation = {task.sample(seed, "eval").key for seed in range(100)}
    assert not train & evaluation
    assert {split_of(key) for key in evaluation} == {"eval"}
    # The same seed gives different questions in the two splits, and different earlier exchanges.
    for seed in range(60):
        asked = [m["content"] for m in task.sample(seed, "train").messages if m["role"] == "user"]
        assert not set(asked) & evaluation


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_scores_one_and_a_wrong_one_zero(name: str) -> None:
    task = TASKS[name]
    for seed in range(40):
        example = task.sample(seed, "eval")
        assert task.score(example, written(example)) == 1.0
        assert task.score(example, written(example) + "7") == 0.0
        assert task.score(example, "") == 0.0


@pytest.mark.parametrize("name", GYM)
def test_the_gym_agrees_with_the_answer(name: str) -> None:
    task = TASKS[name]
    assert isinstance(task, GymTask)
    for seed in range(60):
        example = task.sample(seed)
        assert task.dataset.score_answer(task.normalize(example.answer), example.entry) == 1.0


@pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic", "simple_equations"])
def test_every_line_of_the_steps_is_true(name: str) -> None:
    task = TASKS[name]
    for seed in range(200):
        example = task.sample(seed)
        lines = example.reasoning.split("\n")
        assert re.search(rf"=(?<!\d){re.escape(example.answer)}$", lines[-1])
        for line in lines:
            sides = line.split("=")
            numbers = [side for side in sides if re.fullmatch(r"-?[\d+*/-]+", side)]
            values = {eval(re.sub(r"\b0+(?=\d)", "", side)) for side in numbers}
            assert len(values) <= 1, line


def test_steps_end_in_the_answer_for_letters_bits_and_divisors() -> None:
    for name in ("letter_counting", "count_bits"):
        for seed in range(50):
            example = TASKS[name].sample(seed)
            assert example.reasoning.endswith(example.answer)
    for seed in range(50):
        example = TASKS["gcd"].sample(seed)
        assert example.reasoning.splitlines()[-1].startswith(f"{example.answer}: ")
        assert example.reasoning.endswith(f" {example.answer}")
        example = TASKS["spell_backward"].sample(seed)
        assert re.sub(r"\d", "", example.reasoning.split("\n")[1]) == example.answer


def test_fast_equations_are_the_gyms() -> None:
    config = SimpleEquationsConfig(min_terms=2, max_terms=2, min_value=1, max_value=9, size=1, seed=5)
    ours, gym = FastSimpleEquations(config), SimpleEquationsDataset(config)
    for index in range(150):
        assert ours[index] == gym[index]


def test_thinking_and_effort_have_their_shares() -> None:
    examples = [TASKS["count_bits"].sample(seed) for seed in range(600)]
    assert 0.6 < sum(e.thinking for e in examples) / 600 < 0.73
    assert {e.effort for e in examples} == {"low", "high", "max"}
    assert sum(e.effort == "low" for e in examples) > 540
    turned = dataclasses.replace(examples[0], thinking=True).with_thinking(False)
    assert not turned.prompt().thinking_mode and turned.target().reasoning_content is None


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        ("<｜DSML｜tool_calls>\n<｜DSML｜invoke name=", None),
        (
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
            '<｜DSML｜parameter name="n" string="false">{</｜DSML｜parameter>'
            "\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
            None,
        ),
        (
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
            '<｜DSML｜parameter name="n" string="true">1</｜DSML｜parameter>'
            "\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
            [{"name": "f", "arguments": {"n": "1"}}],
        ),
    ],
)
def test_tool_calls_are_read_back(text: str, calls: list[dict[str, object]] | None) -> None:
    assert parse_tool_calls(text) == calls


@pytest.mark.parametrize("value", ["[" * 5000, "1" * 5000], ids=["deep", "long"])
def test_json_that_python_does_not_read_is_a_wrong_answer(value: str) -> None:
    """Not an error, which would end the sampling of episodes, or an evaluation."""
    call = f'<｜DSML｜parameter name="a" string="false">{value}</｜DSML｜parameter>'
    block = f'<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n{call}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    assert parse_tool_calls(block) is None
    task = TASKS["json_extraction"]
    assert task.score(task.sample(1), value) == 0.0


def test_a_wrong_tool_or_argument_scores_zero() -> None:
    task = TASKS["tool_call"]
    example = next(e for e in (task.sample(n) for n in range(100)) if e.tool_calls and e.tool_calls[0]["name"] == "add")
    text = call_text(example)
    assert task.score(example, text) == 1.0
    assert task.score(example, text.replace('name="add"', 'name="search"')) == 0.0
    assert task.score(example, text.replace('string="false"', 'string="true"')) == 0.0


def test_a_task_that_finds_no_question_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TASKS["gcd"]), "draft", lambda self, rng: None if isinstance(rng, Random) else 1)
    with pytest.raises(RuntimeError, match="gcd"):
        TASKS["gcd"].sample(0)


@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.reworded))
def test_other_wordings_ask_the_same_and_some_are_kept_from_training(name: str) -> None:
    task = TASKS[name]
    own = 0
    for seed in range(400):
        example, rng = task.sample(seed), Random(stable_hash(name, seed, "train"))
        draft = task.draft(rng)
        while draft is None or draft.key != example.key:
            draft = task.draft(rng)
        own += example.question == draft.question
        assert example.question in (draft.question, *draft.wordings.train)
        assert not {draft.question, *draft.wordings.train} & {*draft.wordings.held_out}
    assert 0.57 < own / 400 < 0.73
    for seed in range(50):
        plain, other = task.sample(seed, "eval"), task.sample(seed, "eval", reworded=True)
        assert plain == dataclasses.replace(other, messages=plain.messages) and plain.question != other.question
        values = re.findall(r"\d+", plain.key if name != "number_sorting" else plain.question)
        assert set(values) <= set(re.findall(r"\d+", other.question))


def test_a_task_of_one_wording_says_so() -> None:
    with pytest.raises(ValueError, match="task json_extraction has no other wordings"):
        TASKS["json_extraction"].sample(1, "eval", reworded=True)


def test_steps_of_long_expressions_say_what_is_left() -> None:
    """An expression, from which the reasoning goes on, has the value of the whole."""
    chains = ChainSum(min_terms=3, max_terms=8, max_digits=3)
    for task in (chains, BasicArithmetic(min_terms=3, max_terms=6, max_digits=2)):
        left = 0
        for number in range(200):
            example = task.sample(number, "train")
            for line in example.reasoning.split("\n"):
                if "=" not in line and len(re.findall(r"\d+", line)) > 2:
                    assert eval(line) == int(example.answer), example.reasoning
                    left += 1
        assert left > 100


def test_an_equation_is_stated_again_before_a_long_division() -> None:
    task, divisions = SimpleEquations(max_value=40), 0
    for number in range(100):
        example = task.sample(number, "train")
        lines = example.reasoning.split("\n")
        for before, line in pairwise(lines):
            if found := re.fullmatch(r"(\d+)/(\d)", line):
                assert re.fullmatch(rf"{found[2]}\*[a-z]={found[1]}", before)
                assert lines[-1].endswith(f"={line}={example.answer}")
                divisions += 1
    assert divisions > 20


def test_words_of_a_school_question_do_not_choose_its_split() -> None:
    """Nor does the task that asks for a sum: 4 + 17 is a training question in both or in neither."""
    keys: dict[str, set[str]] = {}
    for seed in range(400):
        example = TASKS["school_mathematics"].sample(seed, "eval")
        keys.setdefault(example.key, set()).add(example.question)
        if match := re.search(r"\d+ [+-] \d+", example.question):
            assert example.key == match[0] and split_of(match[0]) == "eval"
    assert max(map(len, keys.values())) > 1, "two wordings of one question"
    sums = {TASKS["chain_sum"].sample(seed, "train").key for seed in range(400)}
    assert not sums & keys.keys()
