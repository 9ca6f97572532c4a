"""The number of draft tokens follows from measured times and acceptance; trying others costs little."""

from __future__ import annotations

import random

import pytest

from dsv4.engine.draft_length import FIRST_STEPS, AdaptiveLength


class Machine:
    """A made-up engine: seconds of a step by rows, of a round of drafts, and the chance of a draft to stand."""

    def __init__(self, row: float, round: float, chance: float, base: float = 1.0) -> None:
        self.base, self.row, self.round, self.chance = base, row, round, chance
        self.random = random.Random(0)
        self.seconds, self.tokens, self.lengths = 0.0, 0, list[int]()

    def run(self, lengths: AdaptiveLength, steps: int, requests: int = 1) -> None:
        length = rest = 0
        for _ in range(steps):
            seconds = (self.base + self.row * requests * (1 + length)) * self.random.uniform(0.9, 1.1)
            for _ in range(requests):
                accepted = 0
                while accepted < length and self.random.random() < self.chance:
                    accepted += 1
                if length:
                    lengths.count(length, accepted)
                self.tokens += 1 + accepted
            if rest:
                rest -= 1
                lengths.rested(requests, 1)
                self.seconds += seconds
                self.lengths.append(0)
                continue
            lengths.time_step(requests * (1 + length), seconds)
            length = lengths.choose(requests)
            rest = 0 if length else lengths.rest()
            if length:
                lengths.time_drafting(requests, length, self.round * length)
            self.seconds += seconds + self.round * length
            self.lengths.append(length)


@pytest.mark.parametrize(
    ("machine", "best"),
    [
        (Machine(row=0.01, round=0.05, chance=0.9), 4),
        (Machine(row=0.5, round=0.2, chance=0.6), 1),
        (Machine(row=1.0, round=0.3, chance=0.5), 0),
        (Machine(row=0.0, round=0.2, chance=0.0), 0),
    ],
)
def test_the_fastest_length_is_found(machine: Machine, best: int) -> None:
    lengths = AdaptiveLength(4)
    machine.run(lengths, 400)
    late = machine.lengths[200:]
    assert late.count(best) > 0.9 * len(late)
    assert lengths.drafting == (best > 0)


@pytest.mark.parametrize("requests", [1, 5])
def test_where_drafts_do_not_pay_the_time_is_that_without(requests: int) -> None:
    machine = Machine(row=1.0, round=0.5, chance=0.2)
    machine.run(AdaptiveLength(3), 3000, requests)
    plain = machine.tokens / requests * (machine.base + machine.row * requests)
    assert machine.seconds < 1.03 * plain
    assert sum(length > 0 for length in machine.lengths[500:]) > 5, "now and then they are tried"


def test_it_follows_a_change() -> None:
    machine, lengths = Machine(row=0.01, round=0.02, chance=0.0), AdaptiveLength(3)
    machine.run(lengths, 600)
    assert machine.lengths[-20:].count(0) > 15
    machine.chance = 0.95
    machine.run(lengths, 5000)
    assert machine.lengths[-20:].count(3) > 15


def test_each_number_of_rows_is_measured_without_drafts_first() -> None:
    machine, lengths = Machine(row=0.01, round=0.02, chance=0.9), AdaptiveLength(2)
    for requests in (1, 5):
        machine.lengths.clear()
        machine.run(lengths, 20, requests)
        assert machine.lengths[: FIRST_STEPS - 1] == [0] * (FIRST_STEPS - 1) and machine.lengths[-1] == 2


def test_a_long_way_to_catch_up_is_paid_by_fewer_trials() -> None:
    def trials(first_round: float) -> int:
        machine, lengths, count = Machine(row=1.0, round=0.1, chance=0.2), AdaptiveLength(1), 0
        machine.run(lengths, 200)
        for _ in range(5000):
            lengths.time_step(1, 2.0)
            if lengths.choose(1):
                count += 1
                lengths.time_drafting(1, 1, first_round)
                lengths.count(1, 0)
        return count

    assert trials(20.0) * 4 < trials(0.1)


def short_answers(steps: int, most: int, **machine: float) -> float:
    """Time per token of the first steps of fresh engines, as a multiple of that without drafts."""
    total = 0.0
    for seed in range(20):
        made_up = Machine(**machine)
        made_up.random.seed(seed)
        made_up.run(AdaptiveLength(most), steps)
        total += made_up.seconds / (made_up.tokens * (made_up.base + made_up.row))
    return total / 20


@pytest.mark.parametrize(
    ("most", "row", "round", "chance"),
    [(7, 1.0, 0.3, 0.5), (3, 1.0, 0.5, 0.2), (4, 0.05, 0.2, 0.05), (4, 0.3, 0.2, 0.3)],
)
def test_where_drafts_do_not_pay_the_first_trials_cost_little(
    most: int, row: float, round: float, chance: float
) -> None:
    """One draft to learn what drafts cost, and TRIAL_SHARE of the time, with the probes' PROBE_SHARE."""
    first = (row + round) / (1.0 + row)
    for steps in (40, 100, 400):
        assert short_answers(steps, most, row=row, round=round, chance=chance) < 1.0 + first / steps + 0.03


@pytest.mark.parametrize(("most", "row", "round", "chance"), [(4, 0.01, 0.05, 0.9), (7, 0.02, 0.05, 0.8)])
def test_where_drafts_pay_they_are_soon_as_many_as_pay_best(most: int, row: float, round: float, chance: float) -> None:
    def best() -> float:
        length = range(1, most + 1)
        tokens = [sum(chance**place for place in range(count + 1)) for count in length]
        steps = [1.0 + row * (1 + count) + round * count for count in length]
        return min(step / token for step, token in zip(steps, tokens, strict=True)) / (1.0 + row)

    assert short_answers(40, most, row=row, round=round, chance=chance) < best() * 1.25
    assert short_answers(200, most, row=row, round=round, chance=chance) < best() * 1.1
