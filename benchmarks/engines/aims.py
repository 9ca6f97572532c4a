"""What `dsv4 bench engine` aims at, and whether its rows reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.comparison.rows import Row
from benchmarks.engines.plan import IN_TURNS

Against = Literal["llama.cpp", "itself", "floor"]


@dataclass(frozen=True)
class Aim:
    """dsv4's `measure` at `tokens`, as a ratio to llama.cpp's best, to its own at `other`, or to the row's floor.

    unit "bytes": not a ratio but what lies above the floor, and `bound` is the most.
    """

    model: str
    measure: str
    tokens: int
    against: Against
    bound: float
    other: int = 0
    unit: str = "x"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.unit == "bytes" else value >= self.bound

    def text(self) -> str:
        """The aim in a table: ">= 2 x"."""
        if self.unit == "bytes":
            return f"<= {self.bound / 1e9:g} GB above"
        return f">= {self.bound:g} x" if self.against == "llama.cpp" else f">= {100 * self.bound:.0f} %"


AIMS = (
    Aim("slice", "decode", 0, "llama.cpp", 2.0),
    Aim("slice", "decode", 16384, "llama.cpp", 2.5),
    Aim("slice", IN_TURNS, 131072, "itself", 0.6, other=1024),
    Aim("slice", "prefill", 2048, "llama.cpp", 4.0),
    Aim("slice", "prefill", 8192, "llama.cpp", 6.0),
    Aim("slice", "prefill", 32768, "llama.cpp", 10.0),
    Aim("flash-width", "weights read, of a copy's bytes", 1024, "floor", 0.7),
    Aim("flash-width", "operations, of the faster torch.mm", 1024, "floor", 0.6),
    Aim("million", "peak memory", 2**20, "floor", 1.5e9, unit="bytes"),
)


def find(rows: Sequence[Row], peer: str, measure: str, tokens: int) -> Row | None:
    """The best row of a contender: llama.cpp has several, one a GGUF and setting of flash attention."""
    found = [row for row in rows if row.peer.startswith(peer) and (row.measure, row.tokens) == (measure, tokens)]
    better = min if measure == "peak memory" else max
    return better(found, key=lambda row: row.median, default=None)


def ratio(rows: Sequence[Row], peer: str, measure: str, tokens: int) -> float | None:
    """dsv4's median over the best of another contender, None where one of them has no row."""
    ours, theirs = find(rows, "dsv4", measure, tokens), find(rows, peer, measure, tokens)
    return ours.median / theirs.median if ours and theirs else None


def verdict(rows: Sequence[Row], aim: Aim) -> tuple[float, bool] | None:
    """(value, met) of an aim, None where it was not measured."""
    ours = find(rows, "dsv4", aim.measure, aim.tokens)
    if ours is None:
        return None
    if aim.against == "floor":
        value = ours.median - ours.floor if aim.unit == "bytes" else ours.median / ours.floor
    else:
        peer, tokens = ("dsv4", aim.other) if aim.against == "itself" else (aim.against, aim.tokens)
        theirs = find(rows, peer, aim.measure, tokens)
        if theirs is None:
            return None
        value = ours.median / theirs.median
    return value, aim.met(value)


def aim_rows(rows: Sequence[Row], model: str) -> list[Row]:
    """Each aim of a model that was measured, as a row of its own."""
    found = [(aim, verdict(rows, aim)) for aim in AIMS if aim.model == model]
    return [
        Row("aim", aim.measure, aim.tokens, aim.unit, [result[0]], aim.bound, aim.against, {"met": result[1]})
        for aim, result in found
        if result is not None
    ]
