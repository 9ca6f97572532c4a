"""The judge of rubric questions: a snapshot of the policy that lags one step, in an engine of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv4.checkpoint.atomic import new_file
from dsv4.engine import LLM, SamplingParams
from dsv4.model.transformer import Transformer
from dsv4.post_training.rollouts import answer_text, too_long
from dsv4.post_training.rubric import RubricQuestion, Verdict, judge_prompt, verdict
from dsv4.training.qat import as_stored
from dsv4.training.state import StateError


class RubricJudge:
    """Judges with the weights that the policy had a step ago, so that all answers of a step have the same judge.

    `quantized`: as the policy is served; `thinking`: before a score. Options are those of `LLM`.
    """

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Path,
        max_tokens: int = 256,
        quantized: bool = True,
        thinking: bool = True,
        **options: Any,
    ) -> None:
        self.max_tokens, self.quantized, self.thinking = max_tokens, quantized, thinking
        with torch.device(policy.device):
            self._model = Transformer(policy.config, policy.numerics)
        self._model.load_state_dict(policy.state_dict())
        self._store()
        self.llm = LLM(self._model, folder=tokenizer, **options)

    def follow(self, policy: Transformer) -> None:
        """Take over the policy's weights: call before an update, after the step's answers are judged."""
        self._model.load_state_dict(policy.state_dict())
        self._store()

    def save(self, path: Path) -> None:
        """Write the weights, of which a resumed run goes on."""
        with new_file(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self._model.state_dict().items()}, temporary)

    def load(self, path: Path) -> None:
        """Take the weights of a file that `save` wrote. StateError if there is none."""
        if not path.is_file():
            raise StateError(f"{path} is missing: the run was saved with the weights of its judge in it")
        self._model.load_state_dict(load_file(path))
        self._model.freeze()

    @torch.no_grad()
    def _store(self) -> None:
        if self.quantized:
            for name, parameter in self._model.named_parameters():
                parameter.copy_(as_stored(name, parameter))
        self._model.freeze()

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
            found[place] = verdict(problems[place].key, self.thinking, text, finished)
        return [found[place] for place in range(len(problems))]

    def _prompt(self, problem: RubricQuestion, answer: str) -> list[int]:
        assert self.llm.prompts is not None, "questions are judged in text"
        return self.llm.prompts.encode(judge_prompt(problem.question, answer, problem.rubric, self.thinking))
