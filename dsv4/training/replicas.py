"""Data parallelism over processes of one machine that share the weights.

Small layers gain little from several threads, and a thread without a free core stalls the others. So each process
computes the gradient of its own micro-batches on its own thread, and the processes synchronize three times per step: to
sum the target counts, to add the gradients, and after each has stepped its part of the Muon matrices. Weights,
gradients and momenta are in shared memory; only a few numbers are sent besides.
"""

from __future__ import annotations

import pickle
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from dsv4.model.transformer import Transformer
from dsv4.training.anticipatory import Anticipation
from dsv4.training.attention_phase import AttentionPhase
from dsv4.training.gradient import BatchSource, MicroBatch, Result, Routing, Work, compute_gradient, sum_counts
from dsv4.training.helper import Failure, OtherSideEndedError, Shared, Update, receive, send, serve
from dsv4.training.losses import Counts, NoTargetsError
from dsv4.training.optim import MuonAdamW
from dsv4.training.step_batches import Place, Reader

SHARED_MEMORY = Path("/dev/shm")
END_SECONDS = 20.0  # grace period for a helper to exit


class ReplicaError(RuntimeError):
    """A helper process failed or ended; nothing of the step was saved."""


class Replicas:
    """`count` processes, this one and helpers, with `micro_batches` per process and step. Use as a context manager.

    With count 1 there are no helpers. Sources are pickled to the helpers. A helper's error is raised here as
    ReplicaError with its cause.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: MuonAdamW,
        sources: Sequence[BatchSource],
        count: int = 1,
        threads: int = 1,
        micro_batches: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError(f"the number of replicas is {count}; allowed: 1 or more")
        if micro_batches < 1:
            raise ValueError(f"the number of micro-batches is {micro_batches}; allowed: 1 or more")
        self.model, self.optimizer, self.sources, self.count = model, optimizer, sources, count
        self._threads, self._micro_batches = threads, micro_batches
        self._place = Place(0, count, micro_batches)
        self._device = next(model.parameters()).device
        self._reader = Reader(self._place, sources, self._device)
        self._helpers: list[_HelperHandle] = []
        self._shared: Shared | None = None

    def __enter__(self) -> Replicas:
        if self.count > 1:
            try:
                self._start_helpers()
            except BaseException:
                self._end_helpers(at_once=True)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_helpers(at_once=kind is not None)

    def _end_helpers(self, at_once: bool) -> None:
        for helper in self._helpers:
            helper.end(at_once)
        self._helpers = []

    def _start_helpers(self) -> None:
        if self._device.type != "cpu":
            raise ValueError(f"{self.count} replicas share the CPU's memory, but the model is on {self._device}")
        sources = pickle.dumps(list(self.sources))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._check_shared_memory(trained)
        for parameter in self.model.parameters():
            parameter.data.share_memory_()
        self._shared = Shared(
            [p.data for p in self.model.parameters()],
            [buffer.clone().share_memory_() for buffer in self.model.buffers()],
            [[torch.zeros_like(p).share_memory_() for p in trained] for _ in range(self.count - 1)],
            [momentum.share_memory_() for momentum in self.optimizer.momenta()],
        )
        context = multiprocessing.get_context("spawn")
        for rank in range(1, self.count):
            ours, theirs = context.Pipe()
            arguments = (
                Place(rank, self.count, self._micro_batches), self.model.config, self.optimizer.settings, self._shared,
                sources, self._threads, theirs,
            )  # fmt: skip
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._helpers.append(_HelperHandle(f"replica {rank} of {self.count}", process, ours))
        torch.set_num_threads(self._threads)

    def _check_shared_memory(self, trained: Sequence[Tensor]) -> None:
        """MemoryError if shared memory is too small: the system grants it anyway and sends SIGBUS on first use."""
        own = [*self.model.parameters(), *self.model.buffers(), *self.optimizer.momenta()]
        needed = sum(t.nbytes for t in own if not t.is_shared()) + (self.count - 1) * sum(t.nbytes for t in trained)
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
        if needed > free:
            raise MemoryError(
                f"{self.count} replicas share {needed:,} bytes, {free:,} are free in {SHARED_MEMORY}; give it more "
                "(containers: --shm-size) or train with 1 replica"
            )

    def gradient(self, work: Work) -> list[Result]:
        """Leave the step's gradient on the parameters; return each replica's share of the losses, this process's first.

        The parts of the loss are means over all replicas and micro-batches together. NoTargetsError if no micro-batch
        has a target, ReplicaError if a helper failed.
        """
        for rank, helper in enumerate(self._helpers, 1):
            helper.send(replace(work, routing=self._routing_of(work, rank)))
        batches = self._reader.read(work)
        totals = self._exchange_counts(batches, work)
        results = [compute_gradient(self.model, batches, work, totals)]
        results += [helper.receive() for helper in self._helpers]
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

    def _routing_of(self, work: Work, rank: int) -> dict[int, Routing]:
        numbers = replace(self._place, rank=rank).numbers(work.step, work.size)
        return {number: work.routing[number] for number in numbers if number in work.routing}

    def numbers(self, work: Work) -> range:
        """Numbers of all batches of a step."""
        return self._place.all_numbers(work.step, work.size)

    def anticipate(self, work: Work) -> dict[int, Routing]:
        """Routing of all batches of this or a later step with the parameters of now, by batch number."""
        request = Anticipation(work)
        for helper in self._helpers:
            helper.send(request)
        found = self._reader.anticipate(self.model, request)
        for helper in self._helpers:
            found |= helper.receive()
        return found

    def _exchange_counts(self, batches: Sequence[MicroBatch], work: Work) -> Counts:
        """Sum the counts of all micro-batches of the step and send the sum to the helpers."""
        totals = sum((helper.receive() for helper in self._helpers), sum_counts(batches))
        if not totals.targets:
            numbers = self.numbers(work)
            raise NoTargetsError(
                f"batches {numbers[0]} to {numbers[-1]} of stage {work.stage} hold no target: every masked-in "
                "token is the first of its document"
            )
        for helper in self._helpers:
            helper.send(totals)
        return totals

    def update(self, rate: float, scale: float, attention: AttentionPhase = "sparse") -> None:
        """Step the parameters that the phase trains, a part per process, with gradients times `scale`."""
        for helper in self._helpers:
            helper.send(Update(rate, scale, attention))
        self.optimizer.step(rate, scale, 0, self.count, attention)
        for helper in self._helpers:
            helper.receive()


@dataclass(frozen=True)
class _HelperHandle:
    """The main process's end of a helper."""

    name: str
    process: BaseProcess
    connection: Connection

    def send(self, message: object) -> None:
        try:
            send(self.connection, message)
        except OtherSideEndedError:
            self.receive()  # raises the Failure that the helper sent before it ended, if any
            raise self._ended() from None

    def receive(self) -> Any:
        try:
            message = receive(self.connection)
        except OtherSideEndedError:
            raise self._ended() from None
        if isinstance(message, Failure):
            raise ReplicaError(f"{self.name} failed: {message.error}\n\nIn {self.name}:\n{message.traceback}")
        return message

    def _ended(self) -> ReplicaError:
        self.process.join(END_SECONDS)
        code = self.process.exitcode
        if code is None:
            return ReplicaError(f"{self.name} closed its connection and still runs")
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; the kernel sends it when memory runs out" if name == "SIGKILL" else ""
            return ReplicaError(f"{self.name} was ended by {name}{hint}")
        return ReplicaError(
            f"{self.name} ended with exit code {code}; what it printed stands above. (A script that trains with "
            'replicas must start its work under `if __name__ == "__main__":`.)'
        )

    def end(self, at_once: bool) -> None:
        """Close the connection, which ends an idle helper, and wait until the process has ended; kill it if needed."""
        self.connection.close()
        if at_once:
            self.process.kill()  # it ignores SIGTERM
        self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
