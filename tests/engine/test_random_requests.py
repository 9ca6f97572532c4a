"""Random requests with cancellations, preemptions and restarts: all end, each with its own bits, and nothing leaks.

DSV4_RANDOM_REQUESTS sets how many.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsv4.engine import LLM, SamplingParams
from dsv4.engine.draft_length import FixedLength
from dsv4.engine.request import Request
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import CONFIG, IDS, STRICT_MKL, assert_nothing_leaks, bits

pytestmark = pytest.mark.skipif(
    backends.native_module() is None and not STRICT_MKL, reason="plain torch rounds by the size of a product"
)
COUNT = int(os.environ.get("DSV4_RANDOM_REQUESTS", "250"))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_pages": 9, "max_model_len": 1024},
    {"num_pages": 16, "max_num_seqs": 12, "max_num_batched_tokens": 77, "max_model_len": 1024},
    {"enable_prefix_caching": False, "num_pages": 9, "max_model_len": 1024},
    {"prefix_cache_bytes": 1 << 20, "snapshot_interval": 64},
    {"max_num_seqs": 2, "time_slice": 3},
    {"max_num_seqs": 3, "time_slice": 5, "num_pages": 9, "max_model_len": 1024, "max_num_batched_tokens": 64},
    {"speculate": 2},
    {"speculate": 3, "num_pages": 9, "max_model_len": 1024, "max_num_batched_tokens": 100, "time_slice": 4},
    {"on_disk": "full", "num_pages": 16, "max_model_len": 1024},
    {"on_disk": "periodic:128", "speculate": 1},
    {"on_disk": "zero", "time_slice": 5, "max_num_seqs": 3},
]
CACHE_BYTES = 3 << 20


@dataclass(frozen=True)
class Template:
    """A request, and what it answers alone."""

    prompt: list[int]
    params: SamplingParams
    want: Any


def make_templates(model: Transformer, rng: random.Random, count: int) -> list[Template]:
    llm = LLM(model, enable_prefix_caching=False, max_num_seqs=1)
    templates: list[Template] = []
    for seed in range(count):
        start, length = rng.choice((0, 0, 0, 500)), rng.choice((1, 2, 3, 60, 127, 128, 129, 255, 256, 257, 400, 700))
        params = SamplingParams(
            seed=seed,
            temperature=rng.choice((0.0, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            max_tokens=rng.choice((1, 2, 5, 9, 140)),
            ignore_eos=True,
            logprobs=rng.choice((False, 2)),
            prompt_logprobs=rng.random() < 0.1,
            frequency_penalty=rng.choice((0.0, 0.0, 0.5)),
            cache_salt=rng.choice((None, None, "someone")),
        )
        prompt = IDS[start : start + length]
        templates.append(Template(prompt, params, bits(llm.generate([prompt], params))))
    return templates


def run(llm: LLM, templates: list[Template], rng: random.Random, count: int) -> int:
    """Requests of random templates at random times; returns how many ran to their end."""
    core, open_requests = llm.core, dict[Request, Template]()
    left, steps, done = count, 0, 0
    while left or core.has_work:
        while left and rng.random() < 0.5:
            template = rng.choice(templates)
            request = core.new_request(template.prompt, template.params, rng.choice((None, ("a", "x"), ("b",))))
            open_requests[request] = template
            core.add(request)
            left -= 1
        if open_requests and rng.random() < 0.04:
            request = rng.choice(list(open_requests))
            core.abort(request)
            del open_requests[request]
        if core.scheduler.running and rng.random() < 0.05:
            core.scheduler._preempt(rng.choice(list(core.scheduler.running)))
        for request, _ in core.step():
            if request.finished:
                assert bits([request.output]) == open_requests.pop(request).want
                done += 1
        steps += 1
        assert steps < 400 * (count + 1), "a stall"
    assert not open_requests
    return done


def new_llm(model: Transformer, options: dict[str, Any], folder: Path) -> LLM:
    options = dict(options)
    policy = options.pop("on_disk", None)
    if policy is not None:
        options |= {"cache_dir": folder, "cache_window": policy, "cache_bytes": CACHE_BYTES}
    llm = LLM(model, **options)
    if llm.core.speculator is not None:
        llm.core.speculator.lengths = FixedLength(options["speculate"])
    return llm


def test_all_end_with_their_own_bits_and_nothing_leaks(tmp_path: Path) -> None:
    rng = random.Random(COUNT)
    model = random_model(CONFIG)
    templates = make_templates(model, rng, 60)
    left, settled = COUNT, None
    while left:
        count = min(left, rng.randint(20, 60))
        llm = new_llm(model, rng.choice(OPTIONS), tmp_path)  # the engine starts again
        assert run(llm, templates, rng, count) > count // 3
        assert_nothing_leaks(llm)
        llm.close()
        left -= count
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2 * CACHE_BYTES
        if settled is None and left < 0.6 * COUNT:
            settled = resident_bytes()
    assert settled is None or resident_bytes() - settled < 64 << 20


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
