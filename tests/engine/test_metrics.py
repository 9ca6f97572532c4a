"""Counters of the engine, and the cache's bytes, which the config alone gives."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4.analysis.kv import cache_bytes
from dsv4.cache import Cache
from dsv4.config import ModelConfig
from dsv4.engine import LLM, AsyncEngine, SamplingParams
from dsv4.engine.metrics import Histogram, Metric, MetricRegistry, counter
from dsv4.engine.outputs import complete
from dsv4.kernels import backends
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.moe import expert_loads

from ..model.tiny import random_model, tiny_config
from .prefixes import CONFIG, IDS, cache_of, greedy


def values(llm: LLM) -> dict[str, float]:
    """Values by name and labels; of a histogram the count and the sum."""
    found: dict[str, float] = {}
    for metric in llm.core.metrics.collect():
        for labels, value in metric.samples:
            name = "/".join([metric.name, *(text for _, text in labels)])
            if isinstance(value, Histogram):
                found[name], found[name + "/sum"] = value.count, value.sum
            else:
                found[name] = value
    return found


def test_requests_tokens_and_steps_are_counted(model) -> None:
    llm = LLM(model, max_num_batched_tokens=64)
    params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=1) for n in (1, 5, 9)]
    outputs = llm.generate([[3] * 100, [4, 5], [6]], params)
    got = values(llm)
    assert (got["vllm:prompt_tokens"], got["vllm:generation_tokens"]) == (103, 15)
    assert got["vllm:request_success/length"] == 3 and got["vllm:request_success/stop"] == 0
    assert got["vllm:iteration_tokens_total"] == len(model.batches)
    assert got["vllm:iteration_tokens_total/sum"] == 103 + 12, "the last token of each is never computed"
    assert got["vllm:time_to_first_token_seconds"] == got["vllm:e2e_request_latency_seconds"] == 3
    assert got["vllm:inter_token_latency_seconds"] == 12
    assert got["vllm:num_requests_running"] == got["vllm:num_requests_waiting"] == 0
    timings = [output.timings for output in outputs]
    for name, seconds in (
        ("request_queue_time_seconds", [t.queue_seconds for t in timings]),
        ("request_prefill_time_seconds", [t.prefill_seconds for t in timings]),
        ("request_decode_time_seconds", [t.decode_seconds for t in timings]),
        ("inter_token_latency_seconds", [t.decode_seconds for t in timings]),
    ):
        assert math.isclose(got[f"vllm:{name}/sum"], sum(seconds), rel_tol=1e-9), name
    assert got["vllm:request_prompt_tokens/sum"] == 103 and got["vllm:request_generation_tokens/sum"] == 15


def test_an_aborted_request_is_counted_once_and_one_that_never_came_not_at_all(model) -> None:
    llm = LLM(model)
    requests = [llm.core.new_request([3, 4], SamplingParams()) for _ in range(2)]
    llm.core.add(requests[0])
    for request in requests * 2:
        llm.core.abort(request)
    got = values(llm)
    assert got["vllm:request_success/abort"] == 1 and got["vllm:e2e_request_latency_seconds"] == 0


def test_a_request_of_which_all_has_come_has_stopped(model) -> None:
    async def main(engine: AsyncEngine) -> None:
        events = engine.stream([3, 4], SamplingParams(max_tokens=4000, ignore_eos=True))
        await anext(events)
        await complete(events)
        await events.aclose()
        async with contextlib.aclosing(engine.stream([3, 4], SamplingParams(max_tokens=1))) as events:
            async for _ in events:
                await complete(events)  # it has ended before
        while engine.num_running:
            await asyncio.sleep(0.005)

    model.seconds_per_step = 0.001
    engine = AsyncEngine(llm := LLM(model))
    asyncio.run(main(engine))
    engine.close()
    got = values(llm)
    reasons = [got[f"vllm:request_success/{reason}"] for reason in ("stop", "length", "abort")]
    assert reasons == [1, 1, 0]


def test_hits_preemptions_and_bytes_of_the_cache_are_shown() -> None:
    model = random_model(CONFIG)
    llm = LLM(model, num_pages=8, max_model_len=1024)
    llm.generate([IDS[:300]], greedy())
    llm.generate([IDS[:300]], greedy())
    got = values(llm)
    assert (got["vllm:prefix_cache_queries"], got["vllm:prefix_cache_hits"]) == (600, 299)
    cache, prefixes = cache_of(llm), llm.core.scheduler.cache_manager.prefixes
    assert got["vllm:kv_cache_usage_perc"] == prefixes.num_pages / 8
    assert got["dsv4:cache_bytes/snapshots"] == prefixes.snapshot_bytes > 0
    pages = got["dsv4:cache_bytes/entries"] + got["dsv4:cache_bytes/index_keys"]
    assert pages == got["dsv4:prefix_cache_page_bytes"] == prefixes.num_pages * cache.page_bytes
    assert got["dsv4:cache_bytes/window"] == got["dsv4:cache_bytes/state"] == 0


@pytest.mark.parametrize("path", ["reference", "native"])
def test_the_tokens_of_every_expert_are_counted(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the reference's router for the same tokens; a batch of one and of many, an MTP block, a new backend."""
    config = tiny_config(num_nextn_predict_layers=1, compress_ratios=(0, 4, 128, 4, 0))
    if path == "reference":
        monkeypatch.setattr(backends, "native_module", lambda: None)
    elif backends.native_module() is None:
        pytest.skip("the native kernels are not built")
    model = random_model(config)
    aux = AuxLosses()
    with torch.no_grad():
        model.forward_ragged(RaggedBatch.pack([IDS[:50]]), aux=aux)
        want = np.stack([load.copy() for load in expert_loads(model)[:-1]])
        for load in expert_loads(model):
            load[:] = 0
        cache = model.new_cache(1)
        streams = model.forward_ragged(batch := RaggedBatch.pack([IDS[:49]]), cache)
        model.refresh()
        model.forward_ragged(RaggedBatch.pack([IDS[49:50]], starts=[49]), cache)
        model.mtp_forward(streams, batch.token_ids, batch, model.new_cache(1))
    assert (np.stack(expert_loads(model)[:-1]) == want).all() and want.sum() == 4 * 50 * config.num_experts_per_tok
    assert expert_loads(model)[-1].sum() == 49 * config.num_experts_per_tok
    got = values(LLM(model))
    assert got["dsv4:expert_tokens/2/1"] == want[2, 1] and "dsv4:expert_tokens/mtp.0/0" in got


def test_bytes_and_tokens_of_the_disk_cache_are_shown(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    first, second = LLM(model, cache_dir=tmp_path), LLM(model, cache_dir=tmp_path)
    for llm in (first, second):
        llm.generate([IDS[:300]], greedy())
        llm.flush()
    got, stats = values(second), second.disk_cache.stats
    assert got["vllm:external_prefix_cache_queries"] == got["vllm:external_prefix_cache_hits"] == 299
    assert got["dsv4:disk_cache_load_bytes"] == stats.kv_offload_load_bytes > 0
    written = first.disk_cache.stats.kv_offload_store_bytes
    assert values(first)["dsv4:disk_cache_store_bytes"] == written > stats.kv_offload_load_bytes // 2
    assert got["dsv4:disk_cache_damaged_files"] == got["dsv4:disk_cache_dropped_writes"] == 0
    for llm in (first, second):
        llm.close()


@pytest.mark.parametrize("name", ["nano", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_live_bytes_are_those_of_the_formula_by_component(name: str, dtype: torch.dtype) -> None:
    """Two rows of whole pages, without the MTP block, which the formula leaves out."""
    config = ModelConfig.preset(name)
    shortened = {"compress_ratios": [*list(config.compress_ratios[:4]), 0], "num_hidden_layers": 4}
    config = ModelConfig.from_dict(config.to_dict() | shortened)
    cache, tokens = Cache(config, 2, 1024, torch.device("cpu"), dtype), 640
    for row in (0, 1):
        cache.reserve(*(torch.tensor([n]).numpy() for n in (row, 0, tokens)))
    live, want, scale = cache.live_bytes(2), cache_bytes(config, tokens, "bf16"), dtype.itemsize // 2
    mtp = 2 * cache.layers[-1].window[0].nbytes
    assert live["window"] - mtp == 2 * scale * want.windows
    assert live["state"] == 2 * want.states
    assert live["entries"] == 2 * scale * want.entries
    assert live["index_keys"] == 2 * scale * want.index_keys
    assert cache.live_bytes(0) == live | {"window": 0, "state": 0}


def test_drafts_are_counted_by_position() -> None:
    llm = LLM(max_model_len=256, speculate=4)
    assert llm.core.speculator is not None
    for drafts, accepted in ((3, 2), (1, 1), (4, 0)):
        llm.core.speculator.count(drafts, accepted)
    found = {metric.name: metric for metric in llm.core.metrics.collect()}
    by_position = found["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert [value for _, value in by_position.samples] == [2, 1, 0, 0]
    assert found["vllm:spec_decode_num_draft_tokens"].samples[0][1] == 8
    assert found["vllm:spec_decode_num_accepted_tokens"].samples[0][1] == 3
    assert found["vllm:spec_decode_num_drafts"].samples[0][1] == 3


def test_a_bucket_holds_its_upper_bound() -> None:
    counts = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        counts.observe(value)
    assert counts.counts == [2, 2, 1] and counts.sum == 8


def test_a_further_source_is_collected() -> None:
    class Disk:
        def metrics(self) -> Iterator[Metric]:
            yield counter("dsv4:disk_read_bytes", "Bytes read from the disk.", 7)

    registry = MetricRegistry()
    registry.add(Disk())
    assert [(metric.name, metric.samples) for metric in registry.collect()] == [("dsv4:disk_read_bytes", [((), 7)])]
