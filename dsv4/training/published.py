"""Figures of the published runs, from the DeepSeek-V4 report: defaults of recipes with their shapes, and of plans."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRun:
    """Settings of a run (report, Training Setups)."""

    rate: float  # peak; the last one is a tenth
    warmup_steps: int
    balance_speed: float
    tokens: int
    batch_tokens: int  # of a step, once the batch has grown


_RUNS = {
    "flash": PublishedRun(2.7e-4, 2000, 1e-3, 32_000_000_000_000, 75_497_472),
    "pro": PublishedRun(2.0e-4, 2000, 1e-3, 33_000_000_000_000, 94_371_840),
}


def published_run(preset: str | None) -> PublishedRun | None:
    """The run of a preset, of its base model too; None for nano, and for what is no preset."""
    return _RUNS.get((preset or "").removesuffix("-base"))
