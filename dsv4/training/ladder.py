"""The report's stages, scaled to any context: 4K, 16K, 64K, 1M tokens per document; dense, warm-up, sparse."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.analysis.training_flops import Phase

STEPS_OF_CONTEXT = (256, 64, 16, 1)  # 1M over these is 4K, 16K, 64K, 1M
SHORTEST = 256  # tokens: two windows, below which there is nothing to compress


@dataclass(frozen=True)
class Rung:
    """A stage: its attention, tokens per document, and tokens in all."""

    name: str
    attention: Phase
    sequence: int
    tokens: int


def sequence_lengths(context: int) -> tuple[int, ...]:
    """Document lengths of the stages for a final `context`, ascending; 4K, 16K, 64K and 1M for 1M."""
    return tuple(sorted({min(context, max(SHORTEST, context // part)) for part in STEPS_OF_CONTEXT}))


def rungs(context: int, tokens: int, dense: float, warmup: float, longest: float) -> list[Rung]:
    """Stages of a run of `tokens`, with the shares of dense attention, the warm-up and the longest documents.

    Attention is dense before the 64K stage, as in the report, and sparse from there on. Where the ladder is too short
    for that, the shortest length is dense.
    """
    if not 0.0 < dense + warmup + longest < 1.0 or min(dense, warmup, longest) < 0.0:
        raise ValueError(f"shares {dense}, {warmup} and {longest}; allowed: 0 or more, less than 1 together")
    lengths = sequence_lengths(context)
    short, long = (lengths[:-2] or lengths[:1]), lengths[-2:]
    found = [Rung(f"dense-{length}", "dense", length, round(tokens * dense / len(short))) for length in short]
    found.append(Rung("warmup", "warmup", long[0], round(tokens * warmup)))
    rest = round(tokens * (1 - dense - warmup - longest))
    if len(long) == 1:
        found.append(Rung(f"sparse-{long[0]}", "sparse", long[0], rest + round(tokens * longest)))
    else:
        found.append(Rung(f"sparse-{long[0]}", "sparse", long[0], rest))
        found.append(Rung(f"sparse-{long[1]}", "sparse", long[1], round(tokens * longest)))
    return [rung for rung in found if rung.tokens]
