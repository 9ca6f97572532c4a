"""Helper process of a run with several replicas: shared tensors, messages, worker loop.

Messages are sent by value: a tensor sent as shared memory could only be read while its sender is alive.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from dsv4.config import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.training.anticipatory import Anticipation, predict_routing
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.batch_size import BatchSize
from dsv4.training.gradient import BatchSource, MicroBatch, Routing, Work, compute_gradient, pack_batch, sum_counts
from dsv4.training.losses import Counts
from dsv4.training.memory import keep_freed_memory
from dsv4.training.optim import MuonAdamW


@dataclass(frozen=True)
class Shared:
    """Tensors in memory shared by all processes of the run."""

    parameters: list[Tensor]  # in the order of named_parameters()
    buffers: list[Tensor]
    gradients: list[list[Tensor]]  # one list per helper; the first ends up holding the sum
    momenta: list[Tensor]


@dataclass(frozen=True)
class Place:
    """A process's share of a step: `micro_batches` micro-batches, after those of lower ranks."""

    rank: int
    replicas: int
    micro_batches: int

    def numbers(self, step: int, size: BatchSize | None = None) -> range:
        """Batch numbers of this process in a step of a stage with batches of `size`; None: `micro_batches` per step."""
        count, before = self.micro_batches, step * self.micro_batches
        if size is not None:
            count, before = size.at(step), size.before(step)
        first = before * self.replicas + self.rank * count
        return range(first, first + count)

    def all_numbers(self, step: int, size: BatchSize | None = None) -> range:
        """Batch numbers of all processes in a step of a stage with batches of `size`."""
        first, last = replace(self, rank=0), replace(self, rank=self.replicas - 1)
        return range(first.numbers(step, size).start, last.numbers(step, size).stop)


class Reader:
    """Reads and packs a process's batches; those read ahead are kept until their step."""

    def __init__(self, place: Place, sources: Sequence[BatchSource], device: torch.device) -> None:
        self.place, self._sources, self._device = place, sources, device
        self._ahead: dict[tuple[int, int], list[MicroBatch]] = {}  # by stage and step

    def read(self, work: Work) -> list[MicroBatch]:
        """Batches of a step, with their routing if `work` has it."""
        key = work.stage, work.step
        batches = self._ahead.get(key) or self._pack(work)
        self._ahead = {later: kept for later, kept in self._ahead.items() if later > key}
        numbered = zip(self.place.numbers(work.step, work.size), batches, strict=True)
        return [replace(batch, routing=work.routing.get(number, {})) for number, batch in numbered]

    def anticipate(self, model: Transformer, request: Anticipation) -> dict[int, Routing]:
        """Routing of this process's batches of a later step, by batch number."""
        work = request.work
        key = work.stage, work.step
        batches = self._ahead[key] = self._ahead.get(key) or self._pack(work)
        return dict(zip(self.place.numbers(work.step, work.size), predict_routing(model, batches, work), strict=True))

    def _pack(self, work: Work) -> list[MicroBatch]:
        numbers = self.place.numbers(work.step, work.size)
        return [pack_batch(self._sources[work.stage].batch(number), self._device) for number in numbers]


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
