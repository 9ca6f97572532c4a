"""A helper process of a run with several replicas: what it shares, what it is asked and what it answers.

Answers travel by value: a tensor sent as shared memory would need its sender alive when it is read.
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
from dsv4.training.gradient import BatchSource, MicroBatch, Work, compute_gradient, pack_batch, sum_counts
from dsv4.training.losses import Counts
from dsv4.training.optim import MuonAdamW


@dataclass(frozen=True)
class Shared:
    """Tensors in memory that all processes of the run see."""

    parameters: list[Tensor]  # as named_parameters() lists them
    buffers: list[Tensor]
    gradients: list[list[Tensor]]  # one list a helper process; the first holds the sum in the end
    momenta: list[Tensor]


@dataclass(frozen=True)
class Place:
    """Which of the step's micro-batches a process takes: `micro_batches` of them, after those of lower ranks."""

    rank: int
    replicas: int
    micro_batches: int

    def numbers(self, step: int) -> range:
        """Numbers of this process's batches of a step."""
        first = (step * self.replicas + self.rank) * self.micro_batches
        return range(first, first + self.micro_batches)

    def read(self, sources: Sequence[BatchSource], work: Work, device: torch.device) -> list[MicroBatch]:
        """This process's batches of a step, packed."""
        return [pack_batch(sources[work.stage].batch(number), device) for number in self.numbers(work.step)]


@dataclass(frozen=True)
class Update:
    """A step of the optimizer."""

    rate: float
    scale: float


@dataclass(frozen=True)
class Failure:
    """An error that ended a helper, in words."""

    error: str
    traceback: str


class OtherSideEndedError(RuntimeError):
    """The process at the other end of a connection is gone."""


def send(connection: Connection, message: object) -> None:
    """Send `message` by value."""
    data = pickle.dumps(message)
    try:
        connection.send_bytes(data)
    except OSError as error:
        raise OtherSideEndedError from error


def receive(connection: Connection) -> Any:
    """The next message."""
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
    """A helper's life: counts, gradients and updates as they are asked for, until the connection ends or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's; it closes the connection
    torch.set_num_threads(threads)
    try:
        _Helper(place, config, settings, shared, pickle.loads(sources), connection).run()
    except OtherSideEndedError:
        return
    except Exception as error:  # the main process raises it
        words = "".join(traceback.format_exception_only(error)).strip()
        with suppress(OtherSideEndedError):
            send(connection, Failure(words, traceback.format_exc()))


class _Helper:
    """The helper's copy of model and optimizer on the shared tensors."""

    def __init__(
        self,
        place: Place,
        config: ModelConfig,
        settings: dict[str, Any],
        shared: Shared,
        sources: Sequence[BatchSource],
        connection: Connection,
    ) -> None:
        self.place, self.shared, self.sources, self.connection = place, shared, sources, connection
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
            else:
                self._update(message)

    def _compute(self, work: Work) -> None:
        self.optimizer.zero_grad()
        batches = self.place.read(self.sources, work, torch.device("cpu"))
        send(self.connection, sum_counts(batches))
        totals = receive(self.connection)
        assert isinstance(totals, Counts)
        result = compute_gradient(self.model, batches, work, totals)
        hand_over(self.trained, self.shared.gradients[self.place.rank - 1])
        send(self.connection, result)

    def _update(self, update: Update) -> None:
        for parameter, gradient in zip(self.trained, self.shared.gradients[0], strict=True):
            parameter.grad = gradient
        self.optimizer.step(update.rate, update.scale, self.place.rank, self.place.replicas)
        send(self.connection, None)


def hand_over(parameters: Sequence[nn.Parameter], places: Sequence[Tensor]) -> None:
    """Copy the gradients to `places`; zeros where a parameter has none."""
    for parameter, place in zip(parameters, places, strict=True):
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad)
