"""Score a model on questions of the evaluation split: greedy answers through the engine, batched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dsv4.data.tasks import TASKS, Example
from dsv4.engine import LLM, SamplingParams
from dsv4.evals.results import MODES, Score
from dsv4.post_training.problems import answer_of

MAX_TOKENS = 640
BATCH = 64  # questions per call of the engine


@dataclass(frozen=True)
class Answered:
    """One question and the model's output."""

    example: Example
    text: str
    tokens: int
    finished: bool

    @property
    def mode(self) -> str:
        return MODES[0] if self.example.thinking else MODES[1]


def is_correct(answered: Answered) -> bool:
    """True if the task's scorer accepts the answer; unfinished thinking is wrong."""
    answer = answer_of(answered.text, answered.example.thinking)
    return answer is not None and TASKS[answered.example.task].score(answered.example, answer) >= 1.0


def questions(
    tasks: Sequence[str], modes: Sequence[str], examples: int, first_seed: int = 0, reworded: bool = False
) -> list[Example]:
    """Evaluation questions: `examples` seeds from `first_seed` on per task, each in every mode.

    `reworded`: in wordings that training never has, of the tasks that have any.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {', '.join(unknown)}; allowed: {', '.join(sorted(TASKS))}")
    return [
        TASKS[name].sample(seed, "eval", reworded).with_thinking(mode == MODES[0])
        for name in tasks
        if TASKS[name].reworded or not reworded
        for mode in modes
        for seed in range(first_seed, first_seed + examples)
    ]


def answer_all(
    llm: LLM, asked: Sequence[Example], max_tokens: int, advance: Callable[[int], None] = lambda done: None
) -> list[Answered]:
    """Greedy answers to `asked`, in order; `advance(n)` is called after every n further answers."""
    if llm.tokenizer is None or llm.prompts is None:
        raise ValueError("the model has no tokenizer; tasks are asked in text")
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    # Batches of answers of similar length, so that no sequence waits long for the others.
    order = sorted(range(len(asked)), key=lambda place: (asked[place].thinking, asked[place].task, place))
    answers: dict[int, Answered] = {}
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        outputs = llm.generate([llm.prompts.encode(asked[place].prompt()) for place in places], params)
        for place, output in zip(places, outputs, strict=True):
            ids = list(output.token_ids)
            finished = output.finish_reason == "stop"
            if ids and ids[-1] in llm.config.eos_token_ids:
                ids.pop()
            answers[place] = Answered(asked[place], llm.tokenizer.decode(ids), len(ids), finished)
        advance(len(places))
    return [answers[place] for place in range(len(asked))]


def summarise(answers: Sequence[Answered]) -> list[Score]:
    """One score per task and mode, in the order in which they were asked."""
    grouped: dict[tuple[str, str], list[Answered]] = defaultdict(list)
    for answered in answers:
        grouped[answered.example.task, answered.mode].append(answered)
    return [
        Score(
            task, TASKS[task].group, mode, len(group),
            correct=sum(map(is_correct, group)),
            unfinished=sum(not answered.finished for answered in group),
            tokens=sum(answered.tokens for answered in group),
        )
        for (task, mode), group in grouped.items()
    ]  # fmt: skip


def evaluate(
    model: str | Path | LLM,
    examples: int = 100,
    tasks: Sequence[str] | None = None,
    modes: Sequence[str] = MODES,
    max_tokens: int = MAX_TOKENS,
    device: str = "cpu",
    console: Console | None = None,
    reworded: bool = False,
) -> tuple[list[Score], list[Answered]]:
    """Score `model` on `examples` questions per task and mode; returns (scores, every answer).

    `reworded`: as in `questions`.
    """
    llm = model if isinstance(model, LLM) else LLM(model, device=device, max_num_seqs=32)
    asked = questions(list(tasks or TASKS), modes, examples, reworded=reworded)
    with Progress(console=console, transient=True) if console is not None else nullcontext() as bar:
        if isinstance(bar, Progress):
            task = bar.add_task("answering", total=len(asked))
            answers = answer_all(llm, asked, max_tokens, lambda done: bar.advance(task, done))
        else:
            answers = answer_all(llm, asked, max_tokens)
    return summarise(answers), answers
