"""On-policy distillation: the student samples, each domain's teacher says how it would have gone on, token by token.

    loss = sum over teachers of w_i * mean over the tokens of its samples of KL(student || teacher)

over the full vocabulary; or, as the report's rejected alternative for comparison, the sampled-token estimate. A
problem with an environment is asked in a whole episode, whose sampled tokens count: not the results of its tools.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from dsv4.analysis.activations import Recompute
from dsv4.data.stable_hash import stable_hash
from dsv4.engine import SamplingParams
from dsv4.model.aux_losses import AuxLosses
from dsv4.post_training.asking import Episodes, ask
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.kl import reverse_kl
from dsv4.post_training.learner import UpdateError
from dsv4.post_training.policy import token_log_probabilities
from dsv4.post_training.policy_run import LoopSettings, PolicyPosition, PolicyRun, StepFigures
from dsv4.post_training.problems import Problem, ProblemSource
from dsv4.post_training.rollout_service.sampler import ServiceSampler
from dsv4.post_training.rollout_service.service import RolloutService
from dsv4.post_training.rollouts import Sampled, Sampler, answer_hidden, packed
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.post_training.teachers import Teachers
from dsv4.training.optim import MuonAdamW
from dsv4.training.qat import stored_weights
from dsv4.training.recompute import recomputing

Estimate = Literal["full", "sampled"]


@dataclass(frozen=True)
class DistillationSettings:
    """Settings besides the loop's; the report gives no values."""

    samples: int = 1  # answers per prompt
    estimate: Estimate = "full"
    kl_chunk: int = 1024  # tokens whose logits are in memory
    micro_tokens: int = 8192
    grad_clip: float = 1.0
    quantized: bool = True
    balance: float = 1e-4
    indexer: float = 1.0
    episodes: EpisodeLimits = field(default_factory=EpisodeLimits)
    recompute: Recompute = "none"  # activation checkpointing: training/recompute.py

    def __post_init__(self) -> None:
        for name in ("samples", "kl_chunk", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.estimate not in ("full", "sampled"):
            raise ValueError(f"estimate is {self.estimate!r}; allowed: full, sampled")


@dataclass
class _Sums:
    """Figures of a step, added up over micro-batches."""

    loss: float = 0.0
    kl: float = 0.0  # sum over tokens
    tokens: int = 0
    difference: float = 0.0


class DistillationRun(PolicyRun):
    """Trains a student on its own samples towards the teachers of their domains.

    `service`: samples, in place of an engine of this process; without staleness.
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
    ) -> None:
        super().__init__(policy, optimizer, problems, loop, run_dir, console, quiet)
        self.teachers, self.settings, self.service = teachers, settings, service

    def run(self, stop_after: int | None = None) -> PolicyPosition:
        """As in PolicyRun; workers of a service work meanwhile."""
        service, position = self.service, self.position
        with nullcontext() if service is None else service.running(position.problems, position.step):
            return super().run(stop_after)

    def save(self) -> None:
        super().save()
        if self.service is not None:
            self.service.queue.keep(self.position.problems)  # the state has learned from the others

    def step(self, rate: float) -> StepFigures:
        settings, started = self.settings, time.perf_counter()
        samples, problems = self.sample()
        sampling = time.perf_counter() - started
        by_domain = self.by_domain(samples, problems)
        self.teachers.store(by_domain, settings.micro_tokens)
        teaching = time.perf_counter() - started - sampling
        sums, norm = self._update(by_domain, rate)
        for sample in samples:
            sample.release()
        figures = {domain: float(one.kl / one.tokens) for domain, one in sums.items()}
        tokens = sum(one.tokens for one in sums.values())
        return StepFigures(
            {
                "loss": sum(one.loss for one in sums.values()),
                "kl": sum(one.kl for one in sums.values()) / tokens,
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
        with self._sampling() as llm:
            first, problems, prompts = self.take_problems(llm, self.loop.prompts)
            params = SamplingParams(max_tokens=self.loop.max_tokens)
            seed = stable_hash("distillation", self.loop.seed, first) >> 2
            episodes = Episodes(settings.episodes, TrajectoryFiles(self.run_dir / "episodes"), self.sessions.of(first))
            return ask(llm, problems, prompts, settings.samples, params, seed, episodes), problems

    @contextmanager
    def _sampling(self) -> Iterator[Sampler]:
        """Context in which problems are asked: gives the sampler of the next ones."""
        if self.service is None:
            with self.policy.serving() as llm:
                yield llm
            return
        self.service.publish(self.position.step, self.policy.model)
        yield ServiceSampler(self.service, self.policy.model.config, self.position.problems)

    def by_domain(self, samples: Sequence[Sampled], problems: Sequence[Problem]) -> dict[str, list[Sampled]]:
        """Samples by their teacher's domain, in its order, so that a head is loaded once; without those that failed.

        UpdateError if all failed.
        """
        found: dict[str, list[Sampled]] = {}
        for error in sorted({sample.error for sample in samples if sample.error is not None}):
            self.console.print(f"{error}; its samples are left out", highlight=False)
        for sample in samples:
            if sample.error is None and sample.num_tokens:
                domain = self.teachers.domain_of(problems[sample.prompt].domain)
                found.setdefault(domain, []).append(sample)
        if not found:
            raise UpdateError(f"all {len(samples)} samples failed, the last with: {samples[-1].error}")
        return dict(sorted(found.items()))

    def _update(self, by_domain: dict[str, list[Sampled]], rate: float) -> tuple[dict[str, _Sums], float]:
        """One step of the optimizer; the sums of each domain and the gradient's norm."""
        optimizer, settings = self.optimizer, self.settings
        optimizer.zero_grad()
        sums = self.add_gradient(by_domain)
        norm, loss = optimizer.gradient_norm(), sum(one.loss for one in sums.values())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            optimizer.zero_grad()
            raise UpdateError(f"loss {loss}, gradient norm {norm}: not finite; nothing was updated")
        optimizer.step(rate, min(1.0, settings.grad_clip / (norm + 1e-6)))
        optimizer.zero_grad()
        return sums, norm

    def add_gradient(self, by_domain: Mapping[str, Sequence[Sampled]]) -> dict[str, _Sums]:
        """Add the loss's gradient to the parameters'; the sums of each domain. Its teacher has stored hidden states."""
        model, settings = self.policy.model, self.settings
        sums = {domain: _Sums() for domain in by_domain}
        answers = sum(map(len, by_domain.values()))
        stored = stored_weights(model, indexers=False) if settings.quantized else nullcontext()
        with stored, recomputing(model, settings.recompute):
            for domain, rollouts in by_domain.items():
                weight = self.teachers.teachers[domain].weight / sum(one.num_tokens for one in rollouts)
                place = 0
                for micro in packed(rollouts, settings.micro_tokens):
                    places = range(place, place + len(micro))
                    place += len(micro)
                    self._add_gradient(domain, micro, places, weight, len(micro) / answers, sums[domain])
        return sums

    def _add_gradient(
        self, domain: str, micro: Sequence[Sampled], places: Sequence[int], weight: float, share: float, sums: _Sums
    ) -> None:
        """Forward and backward of one micro-batch of a teacher's samples."""
        model, settings, aux = self.policy.model, self.settings, AuxLosses()
        hidden, tokens = answer_hidden(model, micro, aux)
        teacher = (self.teachers.hidden(domain, places), self.teachers.head(domain))
        drawn = [number for rollout in micro for number in rollout.log_probabilities]
        sampled = torch.tensor(drawn, device=model.device)
        if settings.estimate == "full":
            kl = reverse_kl(hidden, model.head.matrix, *teacher, chunk=settings.kl_chunk)
            objective = kl.sum()
            with torch.no_grad():
                log_p = token_log_probabilities(hidden, model.head.matrix, tokens)
        else:
            log_p = token_log_probabilities(hidden, model.head.matrix, tokens)
            objective = sampled_objective(log_p, token_log_probabilities(*teacher, tokens))
            kl = log_p.detach() - token_log_probabilities(*teacher, tokens)
        loss = weight * objective + share * (settings.balance * aux.balance_loss + settings.indexer * aux.indexer_loss)
        loss.backward()
        sums.loss += float(loss.detach())
        sums.kl += float(kl.detach().sum())
        sums.tokens += len(tokens)
        sums.difference = max(sums.difference, float((log_p.detach() - sampled).abs().max()))


def sampled_objective(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum whose gradient is the sampled-token estimate of reverse KL's: advantage log q(y) - log p(y) of each token."""
    advantage = (log_q - log_p).detach()
    return -(advantage * log_p).sum()
