"""Metrics of an engine: plain counters, written by the engine's thread, read from any other.

Names that begin with "vllm:" are vLLM's, where the meaning is the same; those with "dsv4:" are this engine's own. A
source is anything with `metrics()`; `MetricRegistry.add` takes further ones. No Prometheus here: the server exposes
what `MetricRegistry.collect` gives.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from dsv4.engine.outputs import FinishReason, Timings

# vLLM's bounds, in seconds and in tokens.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = tuple(float(2**n) for n in (0, *range(3, 15)))
REQUEST_TOKENS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))[:-2]  # to a million

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of values by bucket. `bounds`: upper bounds, inclusive; the bucket beyond the last has no bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Metric:
    """One metric with its values by labels. A counter's name is without the "_total" that it is shown with."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    samples: Sequence[tuple[Labels, float | Histogram]]


def gauge(name: str, help: str, value: float) -> Metric:
    """A value that goes up and down."""
    return Metric(name, "gauge", help, [((), value)])


def counter(name: str, help: str, value: float) -> Metric:
    """A value that only grows."""
    return Metric(name, "counter", help, [((), value)])


def labelled(
    kind: Literal["gauge", "counter"], name: str, help: str, label: str, values: Iterable[tuple[str, float]]
) -> Metric:
    """A metric with one label: pairs (the label's value, the metric's)."""
    return Metric(name, kind, help, [(((label, key),), value) for key, value in values])


def histogram(name: str, help: str, value: Histogram) -> Metric:
    return Metric(name, "histogram", help, [((), value)])


class MetricSource(Protocol):
    """Gives metrics with their present values; called from another thread than the engine's."""

    def metrics(self) -> Iterable[Metric]: ...


class MetricRegistry:
    """The sources of one engine's metrics."""

    def __init__(self) -> None:
        self._sources: list[MetricSource] = []

    def add(self, source: MetricSource) -> None:
        self._sources.append(source)

    def collect(self) -> Iterator[Metric]:
        """The metrics of all sources, in the order in which these were added."""
        for source in list(self._sources):
            yield from source.metrics()


@dataclass
class RequestMetrics:
    """Outcomes of requests and steps, counted as they happen."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up among stored prefixes
    prefix_hits: int = 0
    finished: dict[FinishReason, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(BETWEEN_TOKENS_SECONDS))
    end_to_end: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    queue: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    inference: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    prefill: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    decode: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    request_prompt: Histogram = field(default_factory=lambda: Histogram(REQUEST_TOKENS))
    request_generation: Histogram = field(default_factory=lambda: Histogram(REQUEST_TOKENS))

    def begun(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request's first step begins."""
        self.prefix_queries += num_prompt_tokens
        self.prefix_hits += num_cached_tokens

    def sampled(self, before: Timings | None, now: Timings) -> None:
        """A request has new tokens; `before`: its timings without them, None for its first."""
        if before is None:
            self.prompt_tokens += now.num_prompt_tokens
            self.generation_tokens += now.num_output_tokens
            self.first_token.observe(now.queue_seconds + now.prefill_seconds)
        else:
            self.generation_tokens += now.num_output_tokens - before.num_output_tokens
            self.between_tokens.observe(now.decode_seconds - before.decode_seconds)

    def ended(self, reason: FinishReason, timings: Timings | None) -> None:
        """A request has ended; `timings`: None where it had no token."""
        self.finished[reason] += 1
        if timings is None:
            return
        run = timings.prefill_seconds + timings.decode_seconds
        self.end_to_end.observe(timings.queue_seconds + run)
        self.queue.observe(timings.queue_seconds)
        self.inference.observe(run)
        self.prefill.observe(timings.prefill_seconds)
        self.decode.observe(timings.decode_seconds)
        self.request_prompt.observe(timings.num_prompt_tokens)
        self.request_generation.observe(timings.num_output_tokens)

    def metrics(self) -> Iterator[Metric]:
        yield counter("vllm:prompt_tokens", "Tokens of prompts that were read.", self.prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens that were generated.", self.generation_tokens)
        yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up among prefixes.", self.prefix_queries)
        yield counter("vllm:prefix_cache_hits", "Prompt tokens taken from stored prefixes.", self.prefix_hits)
        ended = ((reason, float(value)) for reason, value in self.finished.items())
        yield labelled("counter", "vllm:request_success", "Requests that ended, by reason.", "finished_reason", ended)
        yield histogram("vllm:iteration_tokens_total", "Tokens computed per step.", self.step_tokens)
        yield histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", self.first_token)
        yield histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", self.between_tokens)
        yield histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", self.end_to_end)
        yield histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", self.queue)
        yield histogram("vllm:request_inference_time_seconds", "From first step to last token.", self.inference)
        yield histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", self.prefill)
        yield histogram("vllm:request_decode_time_seconds", "From the first token to the last.", self.decode)
        yield histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", self.request_prompt)
        yield histogram("vllm:request_generation_tokens", "Tokens of a request's output.", self.request_generation)
