"""DraftLength: how many tokens to draft, from measured times and acceptance. The output never depends on it.

A step that verifies k drafts of each of r requests computes r (1 + k) rows; before it, drafting took k rounds over r
requests. Its time is the median time of steps of as many rows plus that of the rounds; the tokens that it yields follow
from the share of drafts accepted at each position. The length with most tokens per second is taken, where drafts that
were never verified count as good. The first trial is of one draft, to learn what drafts cost. Until TRIAL_DRAFTS were
verified, what those after it lose against steps without drafts is at most TRIAL_SHARE of the time, and what they win
pays for more. Later, other lengths than the best are tried in as many steps as cost at most PROBE_SHARE of the time.
While no drafts are best, only one step in REST_STEPS + 1 is looked at: that takes percents of a small model's step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from math import prod
from statistics import median
from typing import NamedTuple, Protocol

TRIAL_SHARE = 0.02
TRIAL_DRAFTS = 24  # verified drafts of a request after which the measured acceptance is believed
PROBE_SHARE = 0.005  # without what keeping streams before a probe costs, about as much
PROBE_STEPS = 32  # between two probes, at least
PLAN_STEPS = 16  # that a choice is kept at most: making one takes a few percent of a small model's step
REST_STEPS = 15  # that are not looked at, at most
FOLLOWED_STEPS = 24  # before a probe, so that the MTP block has something to read
FIRST_STEPS = 3  # without drafts, for each number of requests
KEPT_TIMES = 15
PRIOR_HITS, PRIOR_TRIES = 3.2, 4.0  # of each position, before anything is known
DECAY = 0.99  # of what is known, with each draft verified


class DraftLength(Protocol):
    """Chooses the number of draft tokens of each step and is told how the last ones went."""

    @property
    def drafting(self) -> bool:
        """False while drafts do not pay: nothing need be done for those to come."""
        ...

    @property
    def following(self) -> bool:
        """False while nothing is to be drafted soon: streams need not be kept."""
        ...

    def choose(self, num_requests: int, /) -> int:
        """Draft tokens of each of `num_requests` that decode next."""
        ...

    def rest(self) -> int:
        """After `choose` gave 0: steps of as many requests that get no drafts and need no call but `rested`."""
        ...

    def rested(self, num_requests: int, steps: int, /) -> None:
        """Takes in steps that went by without other calls."""
        ...

    def count(self, proposed: int, accepted: int, /) -> None:
        """Takes in the verification of one request's drafts."""
        ...

    def time_step(self, rows: int, seconds: float, /) -> None:
        """Takes in the time of a step of `rows` tokens, none of them a prompt's."""
        ...

    def time_drafting(self, num_requests: int, rounds: int, seconds: float, /) -> None:
        """Takes in the time that it took to draft `rounds` tokens of each request."""
        ...


class FixedLength:
    """Always `length` draft tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.drafting = self.following = length > 0

    def choose(self, num_requests: int) -> int:
        return self.length

    def rest(self) -> int:
        return 0

    def rested(self, num_requests: int, steps: int) -> None:
        pass

    def count(self, proposed: int, accepted: int) -> None:
        pass

    def time_step(self, rows: int, seconds: float) -> None:
        pass

    def time_drafting(self, num_requests: int, rounds: int, seconds: float) -> None:
        pass


class AdaptiveLength:
    """The length from 0 to `most` that promises most tokens per second."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafting = True
        self._hits = [PRIOR_HITS] * most
        self._tries = [PRIOR_TRIES] * most
        self._step_times = _Times()
        self._round_times = _Times()
        self._budget = 0.0  # seconds that probes may cost
        self._steps = 0
        self._plans: dict[int, _Plan] = {}  # by number of requests
        self._next_probe = PROBE_STEPS
        self._probed = 0  # the length tried last
        self._verified = 0  # drafts of a request
        self._balance = 0.0  # seconds that trials may lose
        self._trial = 0  # the step of the next one
        self._planned = False  # the latest choice followed a plan
        self._proposed = self._accepted = 0  # in the step that is over
        self._extra: float | None = None  # seconds of drafting that the probe under way was expected to take

    @property
    def following(self) -> bool:
        if self.drafting or self._steps < self._trial:
            return self.drafting or self._steps >= self._trial - FOLLOWED_STEPS
        return self._budget > 0.0 and self._steps >= self._next_probe - FOLLOWED_STEPS

    def acceptance(self) -> list[float]:
        """Share of drafts accepted at each position, of those whose predecessors were."""
        return [hits / tries for hits, tries in zip(self._hits, self._tries, strict=True)]

    def tokens(self, length: int) -> float:
        """Tokens that a request is expected to get from a step with `length` drafts."""
        return 1.0 + sum(prod(self.acceptance()[: place + 1]) for place in range(length))

    def seconds(self, num_requests: int, length: int) -> float:
        """Expected time of a step with `length` drafts per request, drafting included."""
        drafting = length * self._round_times.at(num_requests) if length else 0.0
        return self._step_times.at(num_requests * (1 + length)) + drafting

    def choose(self, num_requests: int) -> int:
        self._proposed = self._accepted = 0
        self._planned = False
        plan = self._plans.get(num_requests)
        if plan is None or self._steps >= plan.end:
            if self._step_times.count(num_requests) < FIRST_STEPS:
                return 0
            plan = self._plans[num_requests] = self._plan(num_requests)
        self._planned = True
        self.drafting = plan.best > 0
        self._extra = None
        self._steps += 1
        if self.drafting and self._verified < TRIAL_DRAFTS:
            if self._balance < 0.0:
                self.drafting = False
                self._trial = self._steps + int(-self._balance / (TRIAL_SHARE * self._step_times.at(num_requests)))
                return 0
            return plan.best if self._verified else 1
        if self._steps < self._next_probe:
            return plan.best
        if self._budget <= 0.0:
            self._next_probe = self._steps + FOLLOWED_STEPS + self._steps_to_earn(-self._budget, PROBE_SHARE)
            return plan.best
        probe = (self._probed + 1) % (self.most + 1)
        if probe == plan.best:
            probe = (probe + 1) % (self.most + 1)
        cost = self.seconds(num_requests, probe) - self.tokens(probe) * plan.seconds_per_token
        if cost > self._budget:
            self._next_probe = self._steps + self._steps_to_earn(cost - self._budget, PROBE_SHARE)
            return plan.best
        self._budget -= cost
        self._probed, self._next_probe = probe, self._steps + PROBE_STEPS
        self._extra = probe * self._round_times.at(num_requests) if probe else None
        return probe

    def rest(self) -> int:
        if self.drafting or not self._planned:
            return 0
        trial = self._trial if self._steps < self._trial else self._next_probe
        return max(0, min(trial - FOLLOWED_STEPS - self._steps - 1, REST_STEPS))

    def rested(self, num_requests: int, steps: int) -> None:
        seconds = steps * self._step_times.at(num_requests)
        self._steps += steps
        self._balance += TRIAL_SHARE * seconds
        self._budget += PROBE_SHARE * seconds

    def _steps_to_earn(self, seconds: float, share: float) -> int:
        """Steps of one request of whose time a share is as long as `seconds`."""
        return int(seconds / (share * self._step_times.at(1) or 1.0))

    def _plan(self, num_requests: int) -> _Plan:
        paces = [self.seconds(num_requests, length) / self.tokens(length) for length in range(self.most + 1)]
        best = min(range(self.most + 1), key=paces.__getitem__)
        return _Plan(best, paces[best], self._steps + min(PLAN_STEPS, 1 + self._steps // 8))

    def count(self, proposed: int, accepted: int) -> None:
        for place in range(min(accepted + 1, proposed, self.most)):
            self._tries[place] = self._tries[place] * DECAY + 1.0
            self._hits[place] = self._hits[place] * DECAY + (place < accepted)
        self._verified += 1
        self._proposed += proposed
        self._accepted += accepted

    def time_step(self, rows: int, seconds: float) -> None:
        self._step_times.add(rows, seconds)
        self._balance += TRIAL_SHARE * seconds
        requests = rows - self._proposed
        if self._proposed and requests > 0:
            self._balance += (1 + self._accepted / requests) * self._step_times.at(requests) - seconds
        self._budget += PROBE_SHARE * seconds

    def time_drafting(self, num_requests: int, rounds: int, seconds: float) -> None:
        self._round_times.add(num_requests, seconds / rounds)
        self._balance -= seconds
        if self._extra is not None:  # the first drafts in a long time: the block had much to read
            self._budget -= max(0.0, seconds - self._extra)
            self._extra = None


class _Plan(NamedTuple):
    """The best length, its time per token, and the step up to which it is kept."""

    best: int
    seconds_per_token: float
    end: int


class _Times:
    """Median times by size, interpolated between the sizes that were measured."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._sizes: list[int] = []

    def count(self, size: int) -> int:
        return len(self._recent.get(size, ()))

    def add(self, size: int, seconds: float) -> None:
        if size not in self._recent:
            self._recent[size] = deque(maxlen=KEPT_TIMES)
            self._sizes = sorted(self._recent)
        self._recent[size].append(seconds)
        self._medians.pop(size, None)

    def at(self, size: int) -> float:
        """Seconds; below the sizes that were measured, those of the smallest; above them, on the line from the smallest
        to the largest; 0 where there is none."""
        if size in self._recent:
            return self._median(size)
        if not self._sizes:
            return 0.0
        place = bisect_left(self._sizes, size)
        if place == 0:
            return self._median(self._sizes[0])
        if place == len(self._sizes):
            low, high = self._sizes[0], self._sizes[-1]
            rise = max(0.0, self._median(high) - self._median(low)) / max(1, high - low)
            return self._median(high) + rise * (size - high)
        low, high = self._sizes[place - 1 : place + 1]
        share = (size - low) / (high - low)
        return self._median(low) * (1 - share) + self._median(high) * share

    def _median(self, size: int) -> float:
        known = self._medians.get(size)
        if known is None:
            known = self._medians[size] = median(self._recent[size])
        return known
