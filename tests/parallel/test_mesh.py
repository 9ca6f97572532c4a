"""Mesh: degrees are checked before any process waits for another."""

from __future__ import annotations

import pytest

from dsv4.analysis.degrees import Degrees
from dsv4.parallel.mesh import launched, process_group


def test_degrees_must_make_the_number_of_ranks() -> None:
    Degrees(data=2, expert=2).check(4, 8, 4)
    with pytest.raises(ValueError, match="data 2.* make 4 ranks; allowed: as many as there are, 3"):
        Degrees(data=2, expert=2).check(3, 8, 4)


def test_degrees_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="expert is 3; allowed: divisors of the 8 experts"):
        Degrees(expert=3).check(3, 8, 4)
    with pytest.raises(ValueError, match="pipeline is 5; allowed: up to the 4 layers"):
        Degrees(pipeline=5).check(5, 8, 4)
    with pytest.raises(ValueError, match="context is 0"):
        Degrees(context=0)


def test_without_a_launcher_the_error_names_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launched({})
    with pytest.raises(ValueError, match="RANK.*torchrun"), process_group():
        pass
