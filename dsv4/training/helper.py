"""Helper process of a run with several replicas: shared tensors, messages, worker loop.

Messages are sent by value: a tensor sent as shared memory could only be read while its sender is alive.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.anticipatory import Anticipation
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.gradient import BatchSource, Work, compute_gradient, sum_counts
from dsv4.training.losses import Counts
from dsv4.training.memory import keep_freed_memory
from dsv4.training.optim import MuonAdamW
from dsv4.training.step_batches import Place, Reader


@dataclass(frozen=True)
class Shared:
    """Tensors in memory shared by all processes of the run."""

    parameters: list[Tensor]  # in the order of named_parameters()
    buffers: list[Tensor]
    gradients: list[list[Tensor]]  # one list per helper; the first ends up holding the sum
    momenta: list[Tensor]


@dataclass(frozen=True)
class Update:
    """Request for an optimizer step of the parameters that a phase trains, at `rate`, with gradients times `scale`."""

    rate: float
    scale: float
    attention: AttentionPhase = "sparse"


@dataclass(frozen=True)
class Failure:
    """The error that ended a helper, as text."""

    error: str
    traceback: str


class OtherSideEndedError(RuntimeError):
    """The process at the other end of a connection has ended."""


def send(connection: Connection, message: object) -> None:
    """Send `message` by value. OtherSideEndedError if the other process has ended."""
    data = pickle.dumps(message)
    try:
        connection.send_bytes(data)
    except OSError as error:
        raise OtherSideEndedError from error


def receive(connection: Connection) -> Any:
    """Receive the next message. OtherSideEndedError if the other process has ended."""
    try:
        data = connection.recv_bytes()
    except (EOFError, OSError) as error:
        raise OtherSideEndedError from error
    return pickle.loads(data)


def serve(
    place: Place,
    config: ModelConfig,
    settings: dict[str, Any],
    shared: Shared,
    sources: bytes,
    threads: int,
    connection: Connection,
) -> None:
    """Worker loop: serve gradient and update requests until the connection closes or an error is sent as Failure."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes; the main one closes the connection
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        _Helper(place, config, settings, shared, pickle.loads(sources), connection).run()
    except OtherSideEndedError:
        return
    except Exception as error:  # re-raised by the main process
        words = "".join(traceback.format_exception_only(error)).strip()
        with suppress(OtherSideEndedError):
            send(connection, Failure(words, traceback.format_exc()))


class _Helper:
    """Model and optimizer of a helper, on the shared parameters and momenta."""

    def __init__(
        self,
        place: Place,
        config: ModelConfig,
        settings: dict[str, Any],
        shared: Shared,
        sources: Sequence[BatchSource],
        connection: Connection,
    ) -> None:
        self.place, self.shared, self.connection = place, shared, connection
        self.reader = Reader(place, sources, torch.device("cpu"))
        with torch.device("meta"):
            self.model = Transformer(config)
        self.model.to_empty(device="cpu")
        for parameter, data in zip(self.model.parameters(), shared.parameters, strict=True):
            parameter.data = data
        for buffer, data in zip(self.model.buffers(), shared.buffers, strict=True):
            buffer.copy_(data)
        self.optimizer = MuonAdamW(self.model, config, **settings)
        self.optimizer.share_momenta(shared.momenta)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def run(self) -> None:
        while True:
            message = receive(self.connection)
            if isinstance(message, Work):
                self._compute(message)
            elif isinstance(message, Anticipation):
                send(self.connection, self.reader.anticipate(self.model, message))
            else:
                self._update(message)

    def _compute(self, work: Work) -> None:
        self.optimizer.zero_grad()
        batches = self.reader.read(work)
        send(self.connection, sum_counts(batches))
        totals = receive(self.connection)
        assert isinstance(totals, Counts)
        result = compute_gradient(self.model, batches, work, totals)
        hand_over(self.trained, self.shared.gradients[self.place.rank - 1])
        send(self.connection, result)

    def _update(self, update: Update) -> None:
        for parameter, gradient in zip(self.trained, self.shared.gradients[0], strict=True):
            parameter.grad = gradient
        self.optimizer.step(update.rate, update.scale, self.place.rank, self.place.replicas, update.attention)
        send(self.connection, None)


def hand_over(parameters: Sequence[nn.Parameter], places: Sequence[Tensor]) -> None:
    """Copy the gradients to `places`; zeros for a parameter without one."""
    for parameter, place in zip(parameters, places, strict=True):
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad)
