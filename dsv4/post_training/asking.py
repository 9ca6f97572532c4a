"""Asking problems: an answer to each, or a whole episode where a problem has an environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4.engine import SamplingParams
from dsv4.post_training.efforts import window_of
from dsv4.post_training.episodes.environment import EpisodeLimits, EpisodeProblem
from dsv4.post_training.episodes.sampling import sample_episodes
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.problems import Problem
from dsv4.post_training.rollouts import Sampled, Sampler, sample_rollouts


@dataclass(frozen=True)
class Episodes:
    """Limits of episodes, the files of their arrays, and the folder of their environments' logs; None: no logs."""

    limits: EpisodeLimits
    files: TrajectoryFiles
    logs: Path | None = None


def ask(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    samples: int,
    params: SamplingParams,
    seed: int,
    episodes: Episodes,
) -> list[Sampled]:
    """`samples` samples of each problem, each with the problem's place; first those of problems without environment.

    An answer has at most `params.max_tokens` tokens, or those of its problem's effort. The same seed gives the same
    tokens.
    """
    goals = [(place, problem) for place, problem in enumerate(problems) if isinstance(problem, EpisodeProblem)]
    asked = sorted(set(range(len(problems))) - {place for place, _ in goals})
    found: list[Sampled] = []
    if asked:
        windows = [window_of(problems[place], params.max_tokens) for place in asked]
        answers = sample_rollouts(sampler, [prompts[place] for place in asked], samples, params, seed, windows)
        found += [replace(answer, prompt=asked[answer.prompt]) for answer in answers]
    if goals:
        found += sample_episodes(sampler, goals, samples, params, seed, episodes.limits, episodes.files, episodes.logs)
    return found
