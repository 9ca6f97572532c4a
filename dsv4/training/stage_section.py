"""Keys of a recipe for its stages, and the report's stages, which `ladder` makes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dsv4.analysis.activations import Recompute
from dsv4.analysis.training_flops import Phase
from dsv4.config import ModelConfig
from dsv4.training.batch_size import BatchSize
from dsv4.training.ladder import rungs
from dsv4.training.recipe import Section

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class StageSection(Section):
    """A part of the run: its documents, its attention, its batches, and its length in steps or tokens."""

    name: str = "pretrain"
    attention: Phase = "sparse"
    steps: Count | None = None
    tokens: Count | None = None
    sequence: Annotated[int, Field(ge=2)] = 1024  # tokens of a document; a longer one is cut
    row_tokens: Annotated[int, Field(ge=2)] = 0  # tokens of a micro-batch; 0: 4096, or `sequence` if that is more
    batch_tokens: Annotated[int, Field(ge=0)] = 0  # tokens of a step; 0: one row per replica
    ramp_from: Annotated[int, Field(ge=0)] = 0  # tokens of the first step; 0: `batch_tokens`, no ramp
    ramp_tokens: Annotated[int, Field(ge=0)] = 0  # tokens over which a step grows to `batch_tokens`
    rate: Annotated[float, Field(gt=0.0)] | None = None  # constant learning rate; left out: the schedule's
    recompute: Recompute | None = None  # left out: the run's
    shards: Texts = ()
    tasks: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("row_tokens"):
            sequence = values.get("sequence", cls.model_fields["sequence"].default)
            values = values | {"row_tokens": max(4096, sequence) if isinstance(sequence, int) else 4096}
        return values

    @model_validator(mode="after")
    def _check_length(self) -> StageSection:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"stage {self.name!r} has steps {self.steps}, tokens {self.tokens}; allowed: one of them")
        return self

    def size(self, replicas: int) -> BatchSize:
        """Micro-batches per step. ValueError unless a step is whole rows of every replica."""
        row = self.row_tokens * replicas
        for key, tokens in (("batch_tokens", self.batch_tokens), ("ramp_from", self.ramp_from)):
            if tokens % row:
                raise ValueError(
                    f"stage {self.name!r}: {key} is {tokens}; allowed: multiples of {row} (rows of {self.row_tokens} "
                    f"tokens on {replicas} replica(s))"
                )
        return BatchSize(row, max(1, self.batch_tokens // row), self.ramp_from // row, self.ramp_tokens)

    def num_steps(self, replicas: int) -> int:
        """Steps of the stage."""
        return self.steps if self.steps is not None else self.size(replicas).steps(self.tokens or 0)

    def num_tokens(self, replicas: int) -> int:
        """Tokens of the stage's full rows."""
        size = self.size(replicas)
        return size.before(self.num_steps(replicas)) * size.tokens


class LadderSection(Section):
    """The report's stages in place of `stages`, for a run of `tokens` and a final `context`."""

    tokens: Count | None = None
    context: Count | None = None  # left out: the model's max_position_embeddings
    batch_tokens: Count | None = None  # left out: one document of the longest per replica
    ramp_from: Share = 0.2  # of batch_tokens
    ramp: Share = 0.03  # of the tokens; at most the first stage's
    dense: Share = 1 / 32
    warmup: Share = 0.002
    longest: Share = 0.1
    warmup_rate: Annotated[float, Field(gt=0.0)] = 1e-3


def default_stages(ladder: LadderSection, config: ModelConfig, replicas: int) -> tuple[StageSection, ...]:
    """Stages of a recipe that has none: those of the ladder, or 100 steps. ValueError as of `rungs`."""
    if ladder.tokens is None:
        return (StageSection(steps=100),)
    context = ladder.context or config.max_position_embeddings
    found: list[StageSection] = []
    for rung in rungs(context, ladder.tokens, ladder.dense, ladder.warmup, ladder.longest):
        row = max(4096, rung.sequence)
        whole: Any = lambda tokens, row=row: max(1, round(tokens / (row * replicas))) * row * replicas  # noqa: E731
        batch = whole(ladder.batch_tokens or max(4096, context) * replicas)
        ramp_from = whole(batch * ladder.ramp_from)
        ramp: dict[str, Any] = {}
        if not found and ramp_from < batch and ladder.ramp:
            # At most the stage's tokens: the next one begins with full batches, to which this one's have grown.
            ramp_tokens = min(max(1, round(ladder.tokens * ladder.ramp)), rung.tokens)
            ramp = {"ramp_from": ramp_from, "ramp_tokens": ramp_tokens}
        rate = ladder.warmup_rate if rung.attention == "warmup" else None
        found.append(
            StageSection(
                name=rung.name,
                attention=rung.attention,
                tokens=rung.tokens,
                sequence=rung.sequence,
                row_tokens=row,
                batch_tokens=batch,
                rate=rate,
                **ramp,
            )
        )
    return tuple(found)
