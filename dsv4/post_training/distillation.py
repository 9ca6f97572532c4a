"""On-policy distillation: the student samples, each domain's teacher says how it would have gone on, token by token.

    loss = sum over teachers of w_i * mean over the tokens of its samples of KL(student || teacher)

over the full vocabulary; or, as the report's rejected alternative for comparison, the sampled-token estimate. A
problem with an environment is asked in a whole episode, whose sampled tokens count: not the results of its tools.
Given texts, which nobody sampled, have a teacher too, and its KL over the full vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.model.aux_losses import AuxLosses
from dsv4.post_training.asking import Episodes, ask
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.given_texts import TEXTS, GivenTexts
from dsv4.post_training.kl import CHUNK, reverse_kl
from dsv4.post_training.policy import token_log_probabilities
from dsv4.post_training.policy_run import LoopSettings, PolicyRun, StepFigures
from dsv4.post_training.problems import Problem, ProblemSource
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.rollouts import Sampled, answer_hidden, packed
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.teachers import Teachers
from dsv4.post_training.updates import (
    UpdateError,
    UpdateSettings,
    auxiliary_loss,
    count_documents,
    take_step,
    update_numerics,
)
from dsv4.training.losses import Counts
from dsv4.training.optim import MuonAdamW

Estimate = Literal["full", "sampled"]


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(UpdateSettings):
    """Settings besides the loop's; the report gives no values."""

    samples: int = 1  # answers per prompt
    estimate: Estimate = "full"
    temperature: float = 1.0  # of the samples; KL and log-probabilities are of the distributions at 1
    kl_chunk: int = CHUNK  # tokens whose logits are in memory
    episodes: EpisodeLimits = field(default_factory=EpisodeLimits)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "kl_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.estimate not in ("full", "sampled"):
            raise ValueError(f"estimate is {self.estimate!r}; allowed: full, sampled")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; allowed: more than 0")
        if self.estimate == "sampled" and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature:g} with the sampled estimate, whose tokens are drawn from what is "
                "trained; allowed: 1, or the full estimate"
            )


@dataclass
class _Sums:
    """Figures of a step, added up over micro-batches."""

    loss: float = 0.0
    kl: float = 0.0  # sum over tokens
    tokens: int = 0
    difference: float = 0.0


class DistillationRun(PolicyRun):
    """Trains a student on its own samples towards the teachers of their domains.

    `texts`: documents of each step besides, of the teacher TEXTS. `service`: samples, in place of an engine of this
    process; without staleness.
    """

    stage = "distill"

    def __init__(
        self,
        policy: ServedPolicy,
        optimizer: MuonAdamW,
        problems: ProblemSource,
        teachers: Teachers,
        loop: LoopSettings,
        settings: DistillationSettings,
        run_dir: Path,
        console: Console | None = None,
        quiet: bool = False,
        service: RolloutService | None = None,
        texts: GivenTexts | None = None,
    ) -> None:
        super().__init__(policy, optimizer, problems, loop, run_dir, console, quiet, service)
        self.teachers, self.settings, self.texts = teachers, settings, texts

    def step(self, rate: float) -> StepFigures:
        settings, started = self.settings, time.perf_counter()
        samples, problems = self.sample()
        sampling = time.perf_counter() - started
        by_domain = self.by_domain(samples, problems)
        if self.texts is not None and (documents := self.texts.of_step(self.position.step)):
            by_domain = dict(sorted({**by_domain, TEXTS: documents}.items()))
        self.teachers.store(by_domain, settings.micro_tokens)
        teaching = time.perf_counter() - started - sampling
        sums, norm = self._update(by_domain, rate)
        for sample in samples:
            sample.release()
        figures = {domain: float(one.kl / one.tokens) for domain, one in sums.items()}
        of_samples = [one for domain, one in sums.items() if domain != TEXTS]
        tokens = sum(one.tokens for one in of_samples)
        return StepFigures(
            {
                "loss": sum(one.loss for one in sums.values()),
                "kl": sum(one.kl for one in of_samples) / tokens,
                "kl_by_teacher": figures,
                "grad_norm": norm,
                "answer_tokens": tokens / len(samples),
                "unfinished": sum(not sample.finished for sample in samples) / len(samples),
                "train_serve_difference": max(one.difference for one in sums.values()),
                "sampling_seconds": round(sampling, 3),
                "teaching_seconds": round(teaching, 3),
            },
            tokens,
            sum(sample.num_document for chosen in by_domain.values() for sample in chosen),
        )

    def sample(self) -> tuple[list[Sampled], list[Problem]]:
        """The student's samples of the next problems, and the problems."""
        settings = self.settings
        with self._sampling() as samplers:
            llm = samplers(self.position.problems)
            first, problems, prompts = self.take_problems(llm, self.loop.prompts)
            params = SamplingParams(max_tokens=self.loop.max_tokens, temperature=settings.temperature)
            seed = stable_hash("distillation", self.loop.seed, first) >> 2
            episodes = Episodes(settings.episodes, TrajectoryFiles(self.run_dir / "episodes"), self.sessions.of(first))
            return ask(llm, problems, prompts, settings.samples, params, seed, episodes), problems

    def by_domain(self, samples: Sequence[Sampled], problems: Sequence[Problem]) -> dict[str, list[Sampled]]:
        """Samples by their teacher's name, in its order, so that a head is loaded once; without those that failed.

        UpdateError if all failed.
        """
        found: dict[str, list[Sampled]] = {}
        for error in sorted({sample.error for sample in samples if sample.error is not None}):
            self.console.print(f"{error}; its samples are left out", highlight=False)
        for sample in samples:
            if sample.error is None and sample.num_tokens:
                found.setdefault(self.teachers.of(problems[sample.prompt]), []).append(sample)
        if not found:
            raise UpdateError(f"all {len(samples)} samples failed, the last with: {samples[-1].error}")
        return dict(sorted(found.items()))

    def _update(self, by_domain: dict[str, list[Sampled]], rate: float) -> tuple[dict[str, _Sums], float]:
        """One step of the optimizer; the sums of each teacher and the gradient's norm."""
        self.optimizer.zero_grad()
        sums = self.add_gradient(by_domain)
        loss = sum(one.loss for one in sums.values())
        return sums, take_step(self.optimizer, loss, rate, self.settings)

    def add_gradient(self, by_domain: Mapping[str, Sequence[Sampled]]) -> dict[str, _Sums]:
        """Add the loss's gradient to the parameters'; the sums of each domain. Its teacher has stored hidden states."""
        model, settings = self.policy.model, self.settings
        sums = {domain: _Sums() for domain in by_domain}
        micro_batches = {domain: packed(rollouts, settings.micro_tokens) for domain, rollouts in by_domain.items()}
        totals = count_documents(micro for micros in micro_batches.values() for micro in micros)
        with update_numerics(model, settings):
            for domain, micros in micro_batches.items():
                weight = self.teachers.teachers[domain].weight / sum(one.num_tokens for one in by_domain[domain])
                place = 0
                for micro in micros:
                    places = range(place, place + len(micro))
                    place += len(micro)
                    self._add_gradient(domain, micro, places, weight, totals, sums[domain])
        return sums

    def _add_gradient(
        self, domain: str, micro: Sequence[Sampled], places: Sequence[int], weight: float, totals: Counts, sums: _Sums
    ) -> None:
        """Forward and backward of one micro-batch of a teacher's samples; `totals`: counts of all documents."""
        model, settings, aux = self.policy.model, self.settings, AuxLosses()
        hidden, tokens = answer_hidden(model, micro, aux)
        teacher = (self.teachers.hidden(domain, places), self.teachers.head(domain))
        drawn = [number for rollout in micro for number in rollout.log_probabilities]
        sampled = torch.tensor(drawn, device=model.device)
        if settings.estimate == "full" or domain == TEXTS:
            kl = reverse_kl(hidden, model.head.matrix, *teacher, chunk=settings.kl_chunk)
            objective = kl.sum()
            with torch.no_grad():
                log_p = token_log_probabilities(hidden, model.head.matrix, tokens)
        else:
            log_p = token_log_probabilities(hidden, model.head.matrix, tokens)
            objective = sampled_objective(log_p, token_log_probabilities(*teacher, tokens))
            kl = log_p.detach() - token_log_probabilities(*teacher, tokens)
        loss = weight * objective + auxiliary_loss(micro, settings, aux, totals)
        loss.backward()
        sums.loss += float(loss.detach())
        sums.kl += float(kl.detach().sum())
        sums.tokens += len(tokens)
        if domain != TEXTS:
            sums.difference = max(sums.difference, float((log_p.detach() - sampled).abs().max()))


def sampled_objective(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum whose gradient is the sampled-token estimate of reverse KL's: advantage log q(y) - log p(y) of each token."""
    advantage = (log_q - log_p).detach()
    return -(advantage * log_p).sum()
