"""Routed experts divided over gloo ranks: gradients are those of one process, whatever a rank's documents are."""

from __future__ import annotations

from .ranks import run_ranks

SHORT = [[40, 9], [3, 2]]  # the second rank's documents make no entry of a compressor


def test_gradients_are_those_of_one_process() -> None:
    """Also where one rank's rows depend on no adapter, where one has no target, and on a stored base."""
    adapters = [["attention"], ["layers.1.attn.compressor.*"], ["experts", "head"]]
    cases = [(SHORT, None, targets, False) for targets in adapters]
    cases += [(SHORT, 1, targets, False) for targets in (None, ["experts"])]
    cases += [(SHORT, None, ["attention", "experts"], True)]
    for found in run_ranks("expert_ranks", "compare", 2, cases):
        for case, deviation in zip(cases, found, strict=True):
            assert deviation < 1e-6, case
