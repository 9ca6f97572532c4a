"""ClusterEngine: the interface of AsyncEngine over replicas that Ray Serve runs, restarts and chooses from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from dsv4.engine.cluster.calls import Call, crash, is_death
from dsv4.engine.cluster.connection import Cluster, ReplicaPlan
from dsv4.engine.cluster.messages import RETRY_SECONDS, Events, ReplicaState
from dsv4.engine.cluster.metrics import merged_metrics
from dsv4.engine.errors import EngineCrashedError, EngineError, QueueFullError
from dsv4.engine.fairness import User
from dsv4.engine.metrics import Metric, MetricRegistry, counter, gauge
from dsv4.engine.outputs import EventStream, TokenStream
from dsv4.engine.process.client import METRICS_SECONDS
from dsv4.engine.process.messages import EngineState, pack_tokens
from dsv4.engine.process.portable_errors import PortableError
from dsv4.engine.process.served_model import ModelFacts, ServedModel
from dsv4.engine.process.suspects import Flight, Suspects, prompt_hash
from dsv4.engine.sampling_params import SamplingParams
from dsv4.model.token_trace import TokenTrace
from dsv4.prefix_digests import block_digests

WATCH_SECONDS = 1.0  # between two looks at the replicas
STATE_SECONDS = 10.0  # that a look waits for one

logger = logging.getLogger("dsv4.engine")

T = TypeVar("T")


class ClusterEngine:
    """Engines of one model in a cluster, until `close`.

    A replica that dies ends its requests with EngineCrashedError; Ray starts another, and the rest take the next ones.
    A prompt that has crashed two is refused (`process/suspects.py`). Waits for the model; raises the errors of loading,
    ClusterError if the replicas cannot be started.
    """

    def __init__(self, cluster: Cluster, plan: ReplicaPlan) -> None:
        self.metrics = MetricRegistry()
        self.metrics.add(_ClusterMetrics(self))
        self.num_replicas = plan.num_replicas
        self.num_restarts = 0
        self._plan = plan
        self._suspects = Suspects()
        self._cluster = cluster.hold()
        self._states: dict[str, EngineState] = {}  # of the replicas that answered last
        self._closed = False
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._beginning: set[Future[Call]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dsv4-cluster", daemon=True)
        self._thread.start()
        self._watching: Future[None] | None = None
        try:
            self._handle = cluster.deploy(plan)
            self._streams = self._handle.options(stream=True)
            facts: ModelFacts | PortableError = self._handle.model.remote().result()
            if isinstance(facts, PortableError):
                raise facts.error()
            self.llm = ServedModel(facts)
            self._take(self._handle.broadcast("state").results(timeout_s=None, return_exceptions=True))
        except BaseException:
            self.close()
            raise
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    @property
    def error(self) -> BaseException | None:
        """Reason for which no request is taken now, None if one is."""
        if self._states:
            return None
        return EngineCrashedError(
            f"none of {self.num_replicas} replicas of the engine is there; they are started again", RETRY_SECONDS
        )

    @property
    def healthy(self) -> bool:
        return not self._closed and self.error is None

    @property
    def num_up(self) -> int:
        """Replicas that take requests."""
        return len(self._states)

    @property
    def num_running(self) -> int:
        return sum(state.num_running for state in list(self._states.values()))

    @property
    def num_waiting(self) -> int:
        return sum(state.num_waiting for state in list(self._states.values()))

    @property
    def num_steps(self) -> int:
        """Steps of the present replicas."""
        return sum(state.num_steps for state in list(self._states.values()))

    def stream(self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)) -> TokenStream:
        """As of AsyncEngine; the caller's thread waits until a replica has validated the request and begins it.

        PromptRefusedError for a prompt that has crashed two replicas. A prompt that was in flight when one crashed may
        have to wait for its trial: it is validated when its first event is asked for.
        """
        events = self._events(self._reserve(prompt_token_ids, params, user, watched=False))
        return cast(TokenStream, events)

    def stream_with_progress(
        self, prompt_token_ids: list[int], params: SamplingParams, user: User = ("",)
    ) -> EventStream:
        """As of AsyncEngine; waits as `stream`."""
        return self._events(self._reserve(prompt_token_ids, params, user, watched=True))

    async def trace(self, token_ids: list[int]) -> TokenTrace:
        """As of AsyncEngine, computed by one of the replicas."""
        self.check()

        async def ask() -> TokenTrace | PortableError:
            try:
                response = self._handle.trace.remote(pack_tokens(token_ids))
                try:
                    return await response
                except asyncio.CancelledError:
                    response.cancel()
                    raise
            except Exception as error:
                raise crash(error) from error

        trace = await asyncio.wrap_future(self._submit(ask()))
        if isinstance(trace, PortableError):
            raise trace.error()
        return trace

    def check_room(self) -> None:
        """Raises QueueFullError if every replica has said that no request may wait; does not ask them."""
        full = [state.full for state in list(self._states.values())]
        if full and full[0] is not None and None not in full:
            raise QueueFullError(full[0])

    def check(self) -> None:
        """Raises EngineError if the engine is closed, EngineCrashedError while no replica is there."""
        if self._closed:
            raise EngineError("the engine is closed")
        if (error := self.error) is not None:
            raise error

    def close(self) -> None:
        """Ends the replicas; unfinished requests get EngineError. Again: does nothing."""
        if self._closed:
            return
        self._closed = True
        for beginning in list(self._beginning):
            beginning.cancel()
        for call in list(self._calls):
            call.fail(EngineError("the engine is closed"))
        if self._watching is not None:
            self._watching.cancel()
        self._cluster.remove(self._plan.name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._cluster.let_go()

    def collect_metrics(self) -> list[ReplicaState]:
        """Counts and metrics of the replicas that answer in time."""

        async def ask() -> list[Any]:
            answers = self._handle.broadcast("state", True)
            return await answers.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)

        try:  # in the engine's loop: Ray refuses to wait in a thread that has another
            states = self._submit(ask()).result()
        except Exception:  # Ray's, of many kinds: there is no replica
            return []
        return [state for state in states if isinstance(state, ReplicaState)]

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _reserve(self, prompt_token_ids: list[int], params: SamplingParams, user: User, watched: bool) -> _Reservation:
        self.check()
        tokens = pack_tokens(prompt_token_ids)
        key, digests = prompt_hash(tokens), block_digests(prompt_token_ids, params.cache_salt)

        async def begin() -> Call:
            response = self._streams.generate.remote(tokens, params, user, watched, digests=digests)
            call = Call(self._loop, response, self._note, self._suspects.blame)
            try:
                await call.begin()
            except EngineCrashedError as error:
                if is_death(error):
                    self._suspects.blame_unplaced(key)
                raise
            self._calls.add(call)
            return call

        reservation = _Reservation(key, begin)
        if not self._suspects.suspected(key):
            with self._submitted(reservation) as beginning:
                reservation.call = beginning.result()
        return reservation

    @contextlib.contextmanager
    def _submitted(self, reservation: _Reservation) -> Generator[Future[Call], None, None]:
        """The call of a reservation as it begins; EngineError if the engine is closed meanwhile."""
        beginning = self._submit(reservation.begin())
        self._beginning.add(beginning)
        try:
            yield beginning
        except (CancelledError, asyncio.CancelledError) as error:
            if not self._closed:
                raise
            raise EngineError("the engine is closed") from error
        finally:
            self._beginning.discard(beginning)

    async def _events(self, reservation: _Reservation) -> EventStream:
        flight: Flight | None = None
        try:
            async with self._suspects.flight(reservation.key, self._plan.config.max_queue_seconds) as flight:
                if reservation.call is None:
                    with self._submitted(reservation) as beginning:
                        reservation.call = await asyncio.wrap_future(beginning)
                reservation.call.read(flight)
                async for event in flight:
                    if (yield event):
                        break  # the replica only hears that nobody reads on: it counts as "abort"
        finally:
            if reservation.call is not None:
                reservation.call.release(flight is not None and flight.finished)

    # The methods below run in the loop of this engine.

    def _note(self, events: Events) -> None:
        """Takes the counts that a replica has sent with events."""
        if events.replica in self._states:
            self._states[events.replica] = events.state

    async def _watch(self) -> None:
        """Looks at the replicas until the engine is closed."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                asked = self._handle.broadcast("state")
                answers: list[Any] = await asked.results_async(timeout_s=STATE_SECONDS, return_exceptions=True)
            except TimeoutError:
                logger.warning("the replicas of %s do not answer within %g s", self._plan.name, STATE_SECONDS)
                continue
            except Exception:  # Ray's, of many kinds: there is no replica
                answers = []
            self._take(answers)

    def _take(self, answers: list[Any]) -> None:
        """Takes counts of replicas, and exceptions of those that are gone or slow."""
        found = {answer.replica: answer.state for answer in answers if isinstance(answer, ReplicaState)}
        slow = any(isinstance(answer, TimeoutError) for answer in answers)
        gone = [] if slow else [replica for replica in self._states if replica not in found]
        for replica in gone:
            self.num_restarts += 1
            self._suspects.blame(replica)
            logger.error("the replica %s of %s has ended; it is started again", replica, self._plan.name)
        if self._states and found.keys() - self._states.keys() and len(found) == self.num_replicas:
            logger.warning("all %d replicas of %s take requests", self.num_replicas, self._plan.name)
        self._states = self._states | found if slow else found


@dataclass
class _Reservation:
    """A request, and its call once that has begun. The call is stopped when this is dropped."""

    key: str  # hash of the prompt
    begin: Callable[[], Coroutine[Any, Any, Call]]
    call: Call | None = None


class _ClusterMetrics:
    """Metrics of the replicas, each with the label of its replica, and of the cluster."""

    def __init__(self, engine: ClusterEngine) -> None:
        self._engine = weakref.ref(engine)

    def metrics(self) -> Iterator[Metric]:
        engine = self._engine()
        if engine is None:
            return
        yield gauge("dsv4:engine_up", "1 while requests are taken.", float(engine.healthy))
        yield counter("dsv4:engine_restarts", "Replicas that have ended and were started again.", engine.num_restarts)
        yield gauge("dsv4:replicas", "Replicas that are wanted.", engine.num_replicas)
        states = [] if not engine.healthy else engine.collect_metrics()
        yield gauge("dsv4:replicas_up", "Replicas that answer.", len(states))
        yield from merged_metrics(states)
