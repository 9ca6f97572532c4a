"""Data parallelism over processes of one machine that share the weights.

Small layers gain little from several threads each, and a thread that waits for a busy core stops all others. So each
process computes the gradient of its own micro-batch on its own thread, and the processes meet twice a step: when the
gradients are added, and when each has stepped its part of the Muon matrices. Weights, gradients and momenta lie in
shared memory; nothing else is sent but a few numbers.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from dsv4.config import ModelConfig
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer
from dsv4.training.losses import Losses, LossWeights, compute_losses, pack_masks
from dsv4.training.optim import MuonAdamW
from dsv4.training.qat import stored_weights


class Batch(Protocol):
    """Documents of one step and, token by token, whether each token is a target."""

    @property
    def documents(self) -> Sequence[Sequence[int]]: ...
    @property
    def loss_masks(self) -> Sequence[Sequence[int]]: ...


class BatchSource(Protocol):
    """Gives any batch of a stage by its number, so that a run resumes without replaying data."""

    def batch(self, step: int, /) -> Batch: ...


@dataclass(frozen=True)
class Work:
    """One step's forward and backward: which source, which of its batches, and how."""

    stage: int
    step: int
    weights: LossWeights
    quantised: bool
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Result:
    """What one micro-batch gave besides its gradient."""

    losses: Losses
    loads: dict[str, Tensor]
    tokens: int


def compute_gradient(model: Transformer, data: Batch, work: Work) -> Result:
    """Forward and backward one micro-batch; the gradients are left on the parameters."""
    device = next(model.parameters()).device
    batch, aux = RaggedBatch.pack(data.documents, device=device), AuxLosses()
    mask = pack_masks(data.loss_masks, device)
    autocast = torch.autocast(device.type, work.autocast) if work.autocast is not None else nullcontext()
    with stored_weights(model) if work.quantised else nullcontext():
        with autocast:
            total, losses = compute_losses(model, batch, mask, work.weights, aux)
        total.backward()
    return Result(losses, {name: load.cpu() for name, load in aux.loads.items()}, len(mask))


@dataclass(frozen=True)
class _Shared:
    parameters: list[Tensor]  # as named_parameters() lists them
    buffers: list[Tensor]
    gradients: list[list[Tensor]]  # one list a helper process; the first holds the sum in the end
    momenta: list[Tensor]


@dataclass(frozen=True)
class _Update:
    rate: float
    scale: float


class Replicas:
    """`count` micro-batches a step: one in this process, the others in helper processes. Use as a context manager.

    With count 1 there are no helpers. Sources are sent to the helpers by pickling.
    """

    def __init__(
        self, model: Transformer, optimiser: MuonAdamW, sources: Sequence[BatchSource], count: int = 1, threads: int = 1
    ) -> None:
        if count < 1:
            raise ValueError(f"the number of replicas is {count}; allowed: 1 or more")
        self.model, self.optimiser, self.sources, self.count = model, optimiser, sources, count
        self._threads = threads
        self._helpers: list[tuple[BaseProcess, Connection]] = []
        self._shared: _Shared | None = None

    def __enter__(self) -> Replicas:
        if self.count > 1:
            self._start_helpers()
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self._helpers:
            connection.close()  # a helper ends when its connection does
            process.join()
        self._helpers = []

    def _start_helpers(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.model.parameters():
            parameter.data.share_memory_()
        self._shared = _Shared(
            [p.data for p in self.model.parameters()],
            [buffer.clone().share_memory_() for buffer in self.model.buffers()],
            [[torch.zeros_like(p).share_memory_() for p in trained] for _ in range(self.count - 1)],
            [momentum.share_memory_() for momentum in self.optimiser.momenta()],
        )
        context = multiprocessing.get_context("spawn")
        for rank in range(1, self.count):
            ours, theirs = context.Pipe()
            arguments = (
                rank, self.count, self.model.config, self.optimiser.settings, self._shared, self.sources, self._threads,
                theirs,
            )  # fmt: skip
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._helpers.append((process, ours))
        torch.set_num_threads(self._threads)

    def gradient(self, work: Work) -> list[Result]:
        """Leave the mean gradient's sum over replicas on the parameters; divide by `count` when stepping."""
        for _, connection in self._helpers:
            connection.send(work)
        data = self.sources[work.stage].batch(work.step * self.count)
        results = [compute_gradient(self.model, data, work)]
        results += [connection.recv() for _, connection in self._helpers]
        if self._shared is not None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            total, *others = self._shared.gradients
            for place, parameter in enumerate(trained):
                for other in others:
                    total[place].add_(other[place])
                if parameter.grad is not None:
                    total[place].add_(parameter.grad)
                parameter.grad = total[place]
        return results

    def update(self, rate: float, scale: float) -> None:
        """Step the optimiser, each process its part, with gradients times `scale`."""
        for _, connection in self._helpers:
            connection.send(_Update(rate, scale))
        self.optimiser.step(rate, scale, 0, self.count)
        for _, connection in self._helpers:
            connection.recv()


def _serve(
    rank: int,
    count: int,
    config: ModelConfig,
    settings: dict[str, Any],
    shared: _Shared,
    sources: Sequence[BatchSource],
    threads: int,
    connection: Connection,
) -> None:
    """A helper's life: gradients and updates as they are asked for, until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's; it closes the connection
    torch.set_num_threads(threads)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for parameter, data in zip(model.parameters(), shared.parameters, strict=True):
        parameter.data = data
    for buffer, data in zip(model.buffers(), shared.buffers, strict=True):
        buffer.copy_(data)
    optimiser = MuonAdamW(model, config, **settings)
    optimiser.share_momenta(shared.momenta)
    trained = [p for p in model.parameters() if p.requires_grad]
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if isinstance(message, Work):
            optimiser.zero_grad()
            data = sources[message.stage].batch(message.step * count + rank)
            result = compute_gradient(model, data, message)
            _hand_over(trained, shared.gradients[rank - 1])
            connection.send(result)
        else:
            for parameter, gradient in zip(trained, shared.gradients[0], strict=True):
                parameter.grad = gradient
            optimiser.step(message.rate, message.scale, rank, count)
            connection.send(None)


def _hand_over(parameters: Sequence[nn.Parameter], places: Sequence[Tensor]) -> None:
    for parameter, place in zip(parameters, places, strict=True):
        if parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad)
