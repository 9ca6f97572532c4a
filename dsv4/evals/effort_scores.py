"""Accuracy and tokens of a model by reasoning effort, on held-out problems of a domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.engine import LLM
from dsv4.evals.domain_scores import COUNT, MAX_TOKENS, DomainScore, evaluate_domain
from dsv4.post_training.domains.domain import Level
from dsv4.post_training.effort_names import EFFORTS, Asked, Mode, asked_efforts


def evaluate_efforts(
    model: str | Path | LLM,
    domain: str,
    count: int = COUNT,
    seed: int = 1,
    max_tokens: int = MAX_TOKENS,
    level: Level = "standard",
    efforts: Sequence[str | int] = EFFORTS,
    windows: Mapping[Mode, int | None] | None = None,
) -> dict[Asked, DomainScore]:
    """Score of each effort on the same `count` problems, all with thinking. Arguments are `evaluate_domain`'s."""
    llm = model if isinstance(model, LLM) else LLM(model, max_num_seqs=32)
    return {
        effort: evaluate_domain(
            llm, domain, count, seed, thinking=True, efforts=(effort,), max_tokens=max_tokens, level=level,
            windows=windows,
        )
        for effort in asked_efforts(efforts)
    }  # fmt: skip


def to_results(scores: Mapping[Asked, DomainScore]) -> dict[str, dict[str, Any]]:
    """`efforts` of results.json: accuracy and mean tokens by level or budget."""
    return {str(effort): {"accuracy": score.rate, "tokens": score.mean_tokens} for effort, score in scores.items()}
