"""Metrics of a cluster's replicas, each with the label of its replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dsv4.engine.cluster.messages import ReplicaState
from dsv4.engine.metrics import Histogram, Labels, Metric


def merged_metrics(states: Sequence[ReplicaState]) -> Iterator[Metric]:
    """Metrics of replicas, each once, with the label of the replica before its own."""
    found: dict[str, tuple[Metric, list[tuple[Labels, float | Histogram]]]] = {}
    for state in states:
        for metric in state.metrics:
            _, samples = found.setdefault(metric.name, (metric, []))
            samples.extend(((("replica", state.replica), *labels), value) for labels, value in metric.samples)
    for metric, samples in found.values():
        yield replace(metric, samples=samples)
