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
from dsv4.post_training.rollouts import Rollout, Sampled, Sampler, sample_rollouts, too_long


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

    Those of a problem whose prompt is too long have an error, and no tokens. An answer has at most `params.max_tokens`
    tokens, or those of its problem's effort. The same seed gives the same tokens.
    """
    limit = sampler.max_model_len
    rooms = [limit - isinstance(problem, EpisodeProblem) for problem in problems]  # a prompt that fills gets a token
    fitting = [place for place, room in enumerate(rooms) if len(prompts[place]) <= room]
    goals = [(place, problem) for place in fitting if isinstance(problem := problems[place], EpisodeProblem)]
    asked = sorted({*fitting} - {place for place, _ in goals})
    found: list[Sampled] = [
        Rollout(
            place, (), (), (), "", finished=False,
            error=f"the prompt of {problems[place].key} {too_long(prompts[place], rooms[place])}",
        )
        for place in sorted({*range(len(problems))} - {*fitting}) for _ in range(samples)
    ]  # fmt: skip
    if asked:
        windows = [window_of(problems[place], params.max_tokens) for place in asked]
        answers = sample_rollouts(sampler, [prompts[place] for place in asked], samples, params, seed, windows)
        found += [replace(answer, prompt=asked[answer.prompt]) for answer in answers]
    if goals:
        found += sample_episodes(sampler, goals, samples, params, seed, episodes.limits, episodes.files, episodes.logs)
    return found
