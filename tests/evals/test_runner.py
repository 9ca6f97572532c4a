"""The evaluation runner, with a fake engine that knows the answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dsv4.data.tasks import TASKS
from dsv4.evals.results import MODES, Score, pooled, to_json, to_markdown
from dsv4.evals.runner import answer_all, is_correct, questions, summarise
from dsv4.post_training.problems import answer_of

EOS = 1


class ScriptedEngine:
    """Fake LLM with the right answer to every question; `spoil` changes the texts that it returns."""

    def __init__(self, spoil=lambda example, text: text, finish: str = "stop") -> None:
        self.config = SimpleNamespace(eos_token_ids=(EOS,))
        self.texts: list[str] = []
        self.tokenizer = SimpleNamespace(decode=lambda ids: self.texts[ids[0] - 10])
        self.prompts = SimpleNamespace(encode=lambda conversation: [0])
        self.spoil, self.finish = spoil, finish
        self.queue: list[int] = []
        self.examples: list = []

    def remember(self, examples) -> None:
        self.queue = sorted(range(len(examples)), key=lambda p: (examples[p].thinking, examples[p].task, p))
        self.examples = examples

    def generate(self, prompts, params):
        assert params.temperature == 0.0
        outputs = []
        for _ in prompts:
            example = self.examples[self.queue.pop(0)]
            right = f"{example.reasoning}</think>{example.answer}" if example.thinking else example.answer
            self.texts.append(self.spoil(example, right))
            outputs.append(SimpleNamespace(token_ids=[len(self.texts) + 9, EOS], finish_reason=self.finish))
        return outputs


def scores_of(engine: ScriptedEngine, examples) -> dict[tuple[str, str], Score]:
    engine.remember(examples)
    return {(score.task, score.mode): score for score in summarise(answer_all(engine, examples, max_tokens=9))}


def test_right_answers_score_and_each_goes_to_its_own_question() -> None:
    examples = questions(["gcd", "number_sorting"], MODES, 3)
    done: list[int] = []
    engine = ScriptedEngine()
    engine.remember(examples)
    answers = answer_all(engine, examples, 9, done.append)
    assert [answered.example for answered in answers] == examples
    assert all(map(is_correct, answers))
    assert sum(done) == len(examples) == 12
    assert all(answered.tokens == 1 for answered in answers)  # the end-of-sentence token does not count


def test_a_thought_without_end_is_wrong_even_if_it_holds_the_answer() -> None:
    examples = questions(["gcd"], MODES, 2)
    engine = ScriptedEngine(lambda example, text: text.replace("</think>", " ") if example.thinking else text)
    scores = scores_of(engine, examples)
    assert scores["gcd", "thinking"].correct == 0
    assert scores["gcd", "non-thinking"].correct == 2


def test_cut_answers_are_counted() -> None:
    scores = scores_of(ScriptedEngine(finish="length"), questions(["gcd"], ["thinking"], 2))
    assert scores["gcd", "thinking"].unfinished == 2


def test_questions_are_evaluation_questions_the_same_in_both_modes() -> None:
    examples = questions(["chain_sum"], MODES, 4)
    assert [e.key for e in examples[:4]] == [e.key for e in examples[4:]]
    assert [e.thinking for e in examples] == [True] * 4 + [False] * 4
    training = {TASKS["chain_sum"].sample(seed, "train").key for seed in range(200)}
    assert not training & {e.key for e in examples}


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown tasks juggling.*gcd"):
        questions(["juggling"], MODES, 1)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [("a</think>b", True, "b"), ("ab", True, None), ("ab", False, "ab"), ("</think>", True, "")],
)
def test_answer_follows_the_thinking(text: str, thinking: bool, answer: str | None) -> None:
    assert answer_of(text, thinking) == answer


def test_tables_and_json_hold_the_sums() -> None:
    scores = [
        Score("gcd", "reasoning", "thinking", 10, 9, 0, 300),
        Score("gcd", "reasoning", "non-thinking", 10, 2, 0, 40),
        Score("tool_call", "tools", "thinking", 30, 30, 1, 600),
    ]
    assert pooled(scores, "thinking").correct == 39
    report = json.loads(json.dumps(to_json(scores, {"examples": 10})))
    assert report["overall"]["thinking"]["rate"] == pytest.approx(39 / 40)
    assert report["tasks"][0]["low95"] == pytest.approx(0.5958, abs=1e-4)
    markdown = to_markdown(scores)
    assert "| gcd | 90 % (60-98) | 20 % (6-51) | 30 |" in markdown
    assert "| tool_call | 100 % (89-100) | - | 20 |" in markdown
    assert "| all tasks | 98 % (87-100) | 20 % (6-51) | 22 |" in markdown
