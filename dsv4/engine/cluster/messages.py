"""Answers of a replica to the server. No torch: the server's process has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.engine.metrics import Metric
from dsv4.engine.process.messages import EngineState, PackedEvent

RETRY_SECONDS = 1.0  # after the end of a replica: others are there


@dataclass(frozen=True)
class Events:
    """Events of one request, none in the first answer: the request is valid and has its place in the queue."""

    replica: str
    events: Sequence[PackedEvent]
    state: EngineState


@dataclass(frozen=True)
class ReplicaState:
    """Counts of a replica's engine, and its metrics where they were asked for."""

    replica: str
    state: EngineState
    metrics: Sequence[Metric] = ()
