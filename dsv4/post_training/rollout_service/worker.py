"""A worker of the rollout service: an engine that takes requests from the queue and logs every token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from dsv4.engine import LLM, SamplingParams
from dsv4.engine.outputs import SampledToken, TokenEvent
from dsv4.engine.request import Request
from dsv4.model.choices import Choices
from dsv4.post_training.rollout_service.queue import RolloutQueue
from dsv4.post_training.rollout_service.records import Lease, LoggedToken, Step
from dsv4.post_training.rollout_service.tables import ServiceError

IDLE_SECONDS = 0.2  # between two looks at an empty queue


@dataclass
class _Running:
    """A leased request in the engine, and the number of its tokens that are logged."""

    lease: Lease
    request: Request
    logged: int


class RolloutWorker:
    """Works on the queue until it is told to stop; may die at any point.

    `version`: of the engine's weights; it takes no request that needs newer ones. `workers`: the number of those that
    share the queue. With `use` a worker goes over to new weights in the middle of its requests: their caches are
    computed again, their tokens stay, and each token has the version that drew it.
    """

    def __init__(self, name: str, queue: RolloutQueue, llm: LLM, version: int = 0, workers: int = 1) -> None:
        self.name, self.queue, self.version, self.workers = name, queue, version, workers
        self.room = llm.engine_config.max_num_seqs
        self._llm = llm
        self._running: dict[int, _Running] = {}

    def run(self, until: Callable[[], bool], idle_seconds: float = IDLE_SECONDS) -> None:
        """Step until `until()`; waits where there is nothing to do."""
        while not until():
            if not self.step():
                time.sleep(idle_seconds)

    def step(self) -> bool:
        """Lease what there is room for, compute one step of the engine, log it; False if there was nothing to do."""
        if len(self._running) < self.room:
            room = self.room - len(self._running)
            self._admit(self.queue.lease(self.name, room, self.version, self.workers))
        if not self._running:
            return False
        core = self._llm.core
        events = {request.request_id: event for request, event in core.step()}
        steps = [self._logged(running, events.get(running.request.request_id)) for running in self._running.values()]
        lost = self.queue.write(steps)
        for running in list(self._running.values()):
            if running.request.finished or running.lease.id in lost:
                core.abort(running.request)
                del self._running[running.lease.id]
        return True

    @contextmanager
    def keeping_leases(self, seconds: float) -> Generator[None]:
        """Context without a step of the engine, in which a thread renews the leases, for `seconds` at most."""
        steps = [Step(running.lease, running.logged) for running in self._running.values()]
        left, end = threading.Event(), time.monotonic() + seconds

        def renew() -> None:
            while steps and time.monotonic() < end:
                with suppress(ServiceError):  # the next step says so, if the queue does not answer then either
                    self.queue.write(steps)
                if left.wait(self.queue.lease_seconds / 4):
                    return

        thread = threading.Thread(target=renew, name="dsv4-leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def use(self, llm: LLM, version: int) -> None:
        """Go on with other weights, of another engine or of this one; nothing that was sampled is lost."""
        for running in self._running.values():
            self._llm.core.abort(running.request)
        leases = [running.lease for running in self._running.values()]
        tokens = [_sampled(running.request) for running in self._running.values()]
        choices = [_recorded(running.request) for running in self._running.values()]
        self._running.clear()
        llm.reset_prefix_cache()
        self._llm, self.version = llm, version
        for lease, sampled, recorded in zip(leases, tokens, choices, strict=True):
            self._add(lease, sampled, recorded)

    def _admit(self, leases: list[Lease]) -> None:
        for lease in leases:
            if (before := self._running.pop(lease.id, None)) is not None:  # its own, of which the lease had ended
                self._llm.core.abort(before.request)
            try:
                sampled = [SampledToken(one.token_id, one.log_probability, mask=one.mask) for one in lease.tokens]
                self._add(lease, sampled, [one.choices for one in lease.tokens if one.choices is not None])
            except (ValueError, TypeError) as error:  # of the request: a retry would fail as well
                self.queue.write([Step(lease, len(lease.tokens), error=str(error))])

    def _add(self, lease: Lease, sampled: list[SampledToken], choices: Sequence[Choices]) -> None:
        params = replace(SamplingParams(**lease.params), logprobs=True)
        request = self._llm.core.new_request(list(lease.prompt_token_ids), params)
        if sampled:
            request.append(sampled, time.monotonic())
            request.choices.add(0, *choices)
        running = _Running(lease, request, len(sampled))
        if request.finished:  # its last token was logged, its end was not
            self.queue.write([Step(lease, len(sampled), finish_reason=request.output.finish_reason)])
            return
        self._running[lease.id] = running
        self._llm.core.add(request)

    def _logged(self, running: _Running, event: TokenEvent | None) -> Step:
        """The step of a request to write: without tokens it renews the lease."""
        position = running.logged
        if event is None:
            return Step(running.lease, position)
        running.logged += len(event.token_ids)
        masks = running.request.output.sampling_masks[position:] or [None] * len(event.token_ids)
        choices = [_drawn_from(running.request, position + place) for place in range(len(event.token_ids))]
        tokens = [
            LoggedToken(token, log_p, self.version, mask, drawn_from)
            for token, log_p, mask, drawn_from in zip(event.token_ids, event.logprobs, masks, choices, strict=True)
        ]
        if event.finish_reason == "abort":
            return Step(running.lease, position, tokens, error=f"aborted: {running.request.output.stop_reason}")
        return Step(running.lease, position, tokens, event.finish_reason)


def _drawn_from(request: Request, position: int) -> Choices | None:
    """Choices of the tokens behind which the output token `position` comes, and no earlier one; None: not recorded."""
    stop = len(request.prompt_token_ids) + position
    return request.choices.part(stop - 1 if position else 0, stop) if request.choices.length else None


def _recorded(request: Request) -> Sequence[Choices]:
    """Choices of the tokens that others were drawn behind; of a prompt that is read in part, none."""
    known = request.num_tokens - 1 if request.output.token_ids and request.choices.length else 0
    return request.choices.seal(known) if known else ()


def _sampled(request: Request) -> list[SampledToken]:
    output = request.output
    masks = output.sampling_masks or [None] * len(output.token_ids)
    return [
        SampledToken(token, log_p, mask=mask)
        for token, log_p, mask in zip(output.token_ids, output.logprobs, masks, strict=True)
    ]
