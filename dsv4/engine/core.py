"""EngineCore: requests in, one step at a time, tokens out. Single-threaded; LLM and AsyncEngine drive it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from dsv4.cache.pages import pages_for
from dsv4.config import PAGE_TOKENS
from dsv4.engine.errors import EngineError
from dsv4.engine.fairness import User
from dsv4.engine.grammar import GrammarCompiler
from dsv4.engine.logits import make_processors
from dsv4.engine.metrics import MetricRegistry, RequestMetrics
from dsv4.engine.outputs import Alternatives, FinishReason, SampledToken, Timings, TokenEvent
from dsv4.engine.request import Request, RequestStatus, TextDecoder
from dsv4.engine.runner import ModelRunner
from dsv4.engine.sampler import most_likely, output_seed, sample, verified
from dsv4.engine.sampling_params import MAX_SEED, SamplingParams
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.speculative import Speculator
from dsv4.engine.step import ScheduledChunk
from dsv4.model.choices import ChoiceNotes

CHECK_SECONDS = 1.0  # between two looks at the files of the weights
DISK_SECONDS = 0.1  # that a step waits for prefixes from the disk at most, where it has nothing else to do
PROMPT_LOGITS_BYTES = 64 << 20  # of one request's logits per step, while its prompt is scored


@dataclass(frozen=True)
class CoreLimits:
    """Limits that a request is checked against before it is queued, and the makers of its text and constraint."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int  # prompt and output together
    text_vocab_size: int = 0  # ids that the tokenizer knows; the vocabulary may be padded beyond
    new_decoder: Callable[[], TextDecoder] | None = None  # None: no tokenizer, so no text
    grammars: GrammarCompiler | None = None  # None: no tokenizer, so no constraint
    num_pages: int | None = None  # of the cache, where they are fewer than full rows would need


class EngineCore:
    """Scheduler and runner together. Not thread-safe: one thread calls it.

    files_change: says what has happened to the files that the weights lie in, None while they are as they were loaded.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        limits: CoreLimits,
        files_change: Callable[[], str | None] | None,
        speculator: Speculator | None,
    ) -> None:
        self.runner = runner
        self.speculator = speculator
        self.scheduler = scheduler
        self.limits = limits
        self.counters = RequestMetrics()
        self.metrics = MetricRegistry()
        for source in (scheduler, scheduler.cache_manager, self.counters):
            self.metrics.add(source)
        if speculator is not None:
            self.metrics.add(speculator)
        self._request_ids = itertools.count(1)
        self._files_change = files_change
        self._next_check = 0.0
        # Between two looks of `check_files` steps may have computed with other weights than those that the disk's keys
        # name.
        scheduler.cache_manager.may_store = lambda: files_change is None or files_change() is None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def new_request(self, prompt_token_ids: list[int], params: SamplingParams, user: User | None = None) -> Request:
        """A checked request, not queued yet. Raises ValueError for a prompt that cannot run; safe from any thread.

        `user`: who waits for it; it then takes turns with other requests. None: nobody waits for it alone, it runs to
        its end once it has begun. Its constraint is compiled here, in the thread of the caller.
        """
        if params.n != 1:
            raise ValueError(f"SamplingParams.n is {params.n}; allowed: 1 here, any number for LLM.generate")
        return self._new_request(prompt_token_ids, params, 0, user)

    def new_requests(self, prompt_token_ids: list[int], params: SamplingParams) -> list[Request]:
        """`params.n` requests of one prompt, as of `new_request`. The seed of each follows from its index."""
        return [self._new_request(prompt_token_ids, params, index, None) for index in range(params.n)]

    def _new_request(
        self, prompt_token_ids: list[int], params: SamplingParams, index: int, user: User | None
    ) -> Request:
        self._check(prompt_token_ids, params)
        limits = self.limits
        stops = set(params.stop_token_ids)
        if params.is_constrained or not params.ignore_eos:  # a constraint has no other end
            stops.update(limits.eos_token_ids)
        prompt_chunk = max(1, PROMPT_LOGITS_BYTES // (4 * limits.vocab_size))
        return Request(
            request_id=next(self._request_ids),
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            seed=secrets.randbelow(MAX_SEED) if params.seed is None else output_seed(params.seed, index),
            stop_token_ids=frozenset(stops),
            max_total_tokens=limits.max_model_len,
            decoder=limits.new_decoder() if limits.new_decoder else None,
            processors=make_processors(params.logit_bias, params.presence_penalty, params.frequency_penalty),
            constraint=limits.grammars.compile(params) if params.is_constrained and limits.grammars else None,
            user=user or ("",),
            takes_turns=user is not None,
            max_chunk_tokens=prompt_chunk if params.prompt_logprobs else None,
            text_vocab_size=limits.text_vocab_size,
        )

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """Ends a new, waiting or running request for this reason; one that has ended stays as it is."""
        if not request.finished:
            if request.status is not RequestStatus.NEW:
                self.counters.ended(reason, request.output.timings)
            request.abort(reason)
            self.scheduler.finish(request)

    def abort_all(self) -> None:
        """Ends every waiting or running request."""
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            self.abort(request)

    def reset_prefix_cache(self) -> None:
        """Forgets what was kept of requests that have ended."""
        self.scheduler.cache_manager.reset_prefixes()

    def check_files(self, now: bool = False) -> None:
        """EngineError where a file that the weights lie in is no longer as it was loaded; looks at most once a second.

        now: looks in any case.
        """
        if self._files_change is None or (not now and time.monotonic() < self._next_check):
            return
        self._next_check = time.monotonic() + CHECK_SECONDS
        change = self._files_change()
        if change is not None:
            raise EngineError(f"{change}; the weights are no longer those that were loaded: start again")

    def step(self) -> list[tuple[Request, TokenEvent]]:
        """Computes one ragged batch and returns the new tokens of each request that got some.

        Raises EngineError where a request's logits are no numbers to sample from, and as `check_files` does.
        """
        self.check_files(now=bool(self.scheduler.waiting))
        chunks = self.scheduler.schedule()
        if not chunks and self.scheduler.cache_manager.wait_for_disk(DISK_SECONDS):
            chunks = self.scheduler.schedule()
        if not chunks:
            return []
        started = time.monotonic()
        for chunk in chunks:
            request = chunk.request
            if request.scheduled_time is None:
                self.counters.begun(len(request.prompt_token_ids), request.output.cached_tokens)
            request.mark_scheduled(started)
        self.counters.step_tokens.observe(sum(chunk.num_tokens for chunk in chunks))
        sampling = [chunk for chunk in chunks if chunk.num_samples]
        manager = self.scheduler.cache_manager
        if self.speculator is not None:
            self.runner.keep_streams = self.speculator.follows()
        try:
            output = self.runner.run(chunks)
            if sampling:
                _check_logits(output.logits, sampling)
        except BaseException as error:
            # Nobody may go on from what this step has left, nor, where logits are no numbers, from what led to them.
            manager.distrust(earlier=isinstance(error, EngineError))
            raise
        for chunk in chunks:
            chunk.request.num_computed_tokens = chunk.stop
        if output.prompt_logits is not None:
            _score_prompts(output.prompt_logits, chunks)
        events: list[tuple[Request, TokenEvent]] = []
        if sampling:
            sampled = sample(output.logits, [row for chunk in sampling for row in chunk.sample_requests()])
            events = self._append(sampling, sampled, time.monotonic())
        if output.notes is not None:
            _record_choices(output.notes, chunks)
        if self.speculator is not None and output.streams is not None:
            self.speculator.take_in(chunks, output.streams)
        manager.store_places(chunk.request for chunk in chunks)
        for request, _ in events:
            if request.finished:
                self.scheduler.finish(request)
        if self.speculator is not None:
            self.speculator.draft(chunks, started)
        return events

    def _append(
        self, sampling: list[ScheduledChunk], sampled: list[SampledToken], now: float
    ) -> list[tuple[Request, TokenEvent]]:
        """Gives each chunk's request its tokens, and the cache to know what of the drafts stands."""
        events: list[tuple[Request, TokenEvent]] = []
        first = 0
        for chunk in sampling:
            request, drafts = chunk.request, chunk.draft_token_ids
            tokens = sampled[first : first + 1 + len(drafts)]
            first += len(tokens)
            before = request.output.timings
            standing = verified(tokens, drafts)
            event = request.append(standing, now, len(drafts))
            events.append((request, event))
            self._count(before, event)
            request.draft_token_ids = ()
            if drafts:
                request.num_computed_tokens += len(event.token_ids) - 1  # the last one is not computed yet
                if len(event.token_ids) <= len(drafts):
                    self.scheduler.cache_manager.truncate(request)
                if self.speculator is not None:
                    self.speculator.count(len(drafts), len(standing) - 1)
        return events

    def _count(self, before: Timings | None, event: TokenEvent) -> None:
        assert event.timings is not None
        self.counters.sampled(before, event.timings)
        if event.finish_reason is not None:
            self.counters.ended(event.finish_reason, event.timings)

    def _check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        limits = self.limits
        if not prompt_token_ids:
            raise ValueError("the prompt is empty; it needs at least 1 token")
        # A prompt that fills the context still gets one token: sampling it needs no room in the cache.
        if len(prompt_token_ids) > limits.max_model_len:
            found = (
                f"the prompt has {len(prompt_token_ids)} tokens; the limit is max_model_len = {limits.max_model_len}"
            )
            needed = pages_for(len(prompt_token_ids))
            pages = f"; it needs {needed} pages of {PAGE_TOKENS} tokens, the cache has {limits.num_pages}"
            pages = "" if limits.num_pages is None or needed <= limits.num_pages else pages
            raise ValueError(found + pages)
        # The place is sought only where there is one: a million tokens should not take a tenth of a second.
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < limits.vocab_size:
            place, token_id = next((i, t) for i, t in enumerate(prompt_token_ids) if not 0 <= t < limits.vocab_size)
            raise ValueError(f"token id {token_id} at position {place} is outside [0, {limits.vocab_size - 1}]")
        if params.stop_strings and limits.new_decoder is None:
            raise ValueError(f"stop strings {params.stop_strings!r} need a tokenizer, and this model has none")
        if params.is_constrained and limits.grammars is None:
            raise ValueError("a constraint of the output needs a tokenizer, and this model has none")
        for token_id in (*(params.logit_bias or ()), *params.grammar_after):
            if not 0 <= token_id < limits.vocab_size:
                field = "grammar_after" if token_id in params.grammar_after else "logit_bias"
                raise ValueError(
                    f"SamplingParams.{field} has token id {token_id}; allowed: [0, {limits.vocab_size - 1}]"
                )


def _score_prompts(logits: Tensor, chunks: list[ScheduledChunk]) -> None:
    """Gives requests the log-probabilities of their prompts. logits: the rows that score, chunk by chunk."""
    rows = iter(logits)  # one by one: the bits of a row are its own
    for chunk in chunks:
        if chunk.num_scored:
            first = chunk.start + 1
            targets = chunk.request.prompt_token_ids[first : first + chunk.num_scored]
            scores: list[float] = []
            alternatives: list[Alternatives] = []
            for target in targets:
                logprobs = next(rows).float().log_softmax(dim=-1)
                scores.append(float(logprobs[target]))
                alternatives.append(most_likely(logprobs, chunk.request.params.num_alternatives))
            chunk.request.add_prompt_logprobs(first, scores, alternatives)


def _record_choices(notes: ChoiceNotes, chunks: list[ScheduledChunk]) -> None:
    """Gives requests the choices of their computed tokens, and the outputs of those that have ended all of them."""
    found, first = notes.choices(), 0
    for chunk in chunks:
        request = chunk.request
        computed = request.num_computed_tokens - chunk.start  # without drafts that do not stand
        request.choices.add(chunk.start, found[first : first + computed])
        first += chunk.num_tokens
        if request.finished:
            whole = request.choices.part(0, request.choices.length)
            request.output.routed_experts, request.output.indexer_topk = whole.experts, whole.entries


def _check_logits(logits: Tensor, sampling: list[ScheduledChunk]) -> None:
    """EngineError at the first row that makes no distribution: one with NaN or +inf, or with -inf alone.

    A -inf beside finite logits rules one token out and no more. The largest logit shows all three: NaN is larger than
    any number. The error is the whole engine's: from sound weights all logits are finite, so that what else it computes
    cannot be trusted either.
    """
    # On the CPU NumPy's takes a fraction of torch's time.
    largest = (logits.numpy().max(axis=1) if logits.is_cpu else logits.amax(dim=1).cpu().numpy()).tolist()
    if all(map(isfinite, largest)):
        return
    rows = [(chunk.request, i) for chunk in sampling for i in range(chunk.num_samples)]
    (request, drafts), value = next(row for row in zip(rows, largest, strict=True) if not isfinite(row[1]))
    raise EngineError(
        f"the logits of request {request.request_id} after {request.num_tokens + drafts} tokens are not finite "
        f"(the largest is {value}): the weights or what computes with them is damaged"
    )
