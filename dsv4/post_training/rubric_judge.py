"""The judge of rubric questions: a snapshot of the policy that lags one step, in an engine of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4.engine import LLM, SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.frozen_models import PolicyCopy
from dsv4.post_training.rollouts import answer_text, too_long
from dsv4.post_training.rubric import DEFAULT_FORM, JudgeForm, RubricQuestion, Verdict, verdict


class RubricJudge:
    """Judges with the weights that the policy had a step ago, so that all answers of a step have the same judge.

    `weights` are these: they follow the policy before an update, after the step's answers are judged. `quantized`: as
    the policy is served; `thinking`: before a score; `form`: how it is asked. Options are those of `LLM`.
    """

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Path,
        max_tokens: int = 256,
        quantized: bool = True,
        thinking: bool = True,
        form: JudgeForm = DEFAULT_FORM,
        **options: Any,
    ) -> None:
        self.max_tokens, self.quantized, self.thinking, self.form = max_tokens, quantized, thinking, form
        self.weights = PolicyCopy(policy, quantized)
        self.llm = LLM(self.weights.model, folder=tokenizer, **options)

    def scores(self, problems: Sequence[RubricQuestion], answers: Sequence[str]) -> list[Verdict]:
        """Verdict on each answer, greedily decoded; an error for one whose judge prompt is too long, or no text."""
        llm, found = self.llm, dict[int, Verdict]()
        asked: dict[int, list[int]] = {}
        for place, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
            try:
                prompt = self._prompt(problem, answer)
            except UnicodeEncodeError as error:  # of what a program gave: rows of files are checked
                found[place] = Verdict(None, f"the judge's prompt for {problem.key} cannot be encoded: {error}")
                continue
            if len(prompt) <= llm.max_model_len:
                asked[place] = prompt
            else:
                words = f"the judge's prompt for {problem.key} {too_long(prompt, llm.max_model_len)}"
                found[place] = Verdict(None, words)
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        outputs = llm.generate(list(asked.values()), params) if asked else []
        for place, output in zip(asked, outputs, strict=True):
            text, finished = answer_text(llm, output.token_ids), output.finish_reason == "stop"
            found[place] = verdict(problems[place].key, self.thinking, text, finished, self.form)
        return [found[place] for place in range(len(problems))]

    def _prompt(self, problem: RubricQuestion, answer: str) -> list[int]:
        assert self.llm.prompts is not None, "questions are judged in text"
        return self.llm.prompts.encode(self.form.ask(problem.question, answer, problem.rubric, self.thinking))
