"""The spike detector: finds jumps, not slopes or single hard batches; goes on from its saved state."""

from __future__ import annotations

import math
import random

import pytest

from dsv4.training.spikes import Spike, SpikeDetector, SpikeSettings


def watch(detector: SpikeDetector, losses: list[float], first: int = 0, phase: str = "a") -> list[Spike]:
    found = [
        detector.observe(step, [phase], {"loss": loss, "grad_norm": 1.0}) for step, loss in enumerate(losses, first)
    ]
    return [spike for spike in found if spike is not None]


def falling(steps: int, noise: float = 0.05) -> list[float]:
    """A loss as it falls from 8 to 3, with noise."""
    draw = random.Random(1)
    return [3.0 + 5.0 * math.exp(-step / 100) + draw.gauss(0.0, noise) for step in range(steps)]


def test_a_falling_noisy_loss_has_no_spike() -> None:
    assert watch(SpikeDetector(SpikeSettings()), falling(1000)) == []


def test_a_jump_within_a_steep_fall_is_a_spike() -> None:
    losses = [4.0 * 0.93**step for step in range(34)]  # half of the fall within the window
    assert watch(SpikeDetector(SpikeSettings()), losses) == []
    assert watch(SpikeDetector(SpikeSettings()), [*losses, 1.6, 1.6]) != []


def test_two_high_steps_are_a_spike_that_began_at_the_first() -> None:
    losses = falling(200)
    losses[150] += 3.0
    detector = SpikeDetector(SpikeSettings())
    assert watch(detector, losses[:151]) == []  # one hard batch
    assert detector.high_since == 150
    (spike,) = watch(detector, [losses[150] + 0.1], first=151)
    assert (spike.start, spike.step, spike.statistic) == (150, 151, "loss")
    assert spike.value > spike.limit > losses[149]


def test_high_steps_do_not_enter_the_history() -> None:
    losses = [v for pair in zip(falling(264)[64:], [9.0] * 200, strict=True) for v in pair]  # every other step is high
    detector = SpikeDetector(SpikeSettings(patience=3, threshold=3.0))
    watch(detector, falling(64), phase="a")
    assert watch(detector, losses, first=64) == []
    assert max(detector.history["loss"]) < 9.0


@pytest.mark.parametrize("statistic", ["loss", "grad_norm"])
def test_a_value_that_is_not_finite_is_a_spike_at_once(statistic: str) -> None:
    spike = SpikeDetector(SpikeSettings()).observe(0, [], {"loss": 1.0, "grad_norm": 1.0} | {statistic: math.nan})
    assert spike is not None and (spike.step, spike.statistic) == (0, statistic)


def test_a_new_phase_starts_the_history_again() -> None:
    detector = SpikeDetector(SpikeSettings())
    watch(detector, falling(100))
    assert watch(detector, [30.0] * 20, first=100, phase="b") == []


def test_a_constant_loss_needs_the_floor() -> None:
    steady = [2.0] * 64
    assert watch(SpikeDetector(SpikeSettings(patience=1)), [*steady, 2.2]) == []
    assert watch(SpikeDetector(SpikeSettings(patience=1)), [*steady, 2.3]) != []


def test_either_statistic_can_spike() -> None:
    detector = SpikeDetector(SpikeSettings(statistic="either", patience=1))
    watch(detector, falling(64))
    spike = detector.observe(64, ["a"], {"loss": 3.0, "grad_norm": 50.0})
    assert spike is not None and spike.statistic == "grad_norm"


def test_a_detector_goes_on_from_its_state() -> None:
    losses = falling(200)
    losses[120:122] = [9.0, 9.0]
    first = SpikeDetector(SpikeSettings())
    watch(first, losses[:121])
    again = SpikeDetector(SpikeSettings(), **first.state())
    assert watch(again, losses[121:], first=121) == watch(first, losses[121:], first=121) != []


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="fewest is 100; allowed: 2 to window, 64"):
        SpikeSettings(fewest=100)
