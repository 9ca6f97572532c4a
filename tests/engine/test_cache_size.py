"""Tokens that an engine promises: the model's limit, as far as memory holds it; a long limit costs nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from dsv4.analysis.kv import cache_bytes
from dsv4.config import ModelConfig
from dsv4.engine import LLM, SamplingParams, loading
from dsv4.engine.cache_size import CacheRoom, cache_size, room_for
from dsv4.engine.config import EngineConfig
from dsv4.engine.machine import Memory

NANO = ModelConfig.preset("nano")
MILLION = 1 << 20


def size(room: CacheRoom | None = None, **options: int) -> tuple[int, int, bool]:
    found = cache_size(NANO, EngineConfig(**options), room)
    return found.max_model_len, found.num_pages, found.by_pages


def test_the_models_limit_is_the_default() -> None:
    assert size() == (MILLION, 8 * 8192, False)
    assert size(CacheRoom(1 << 50, 1000)) == (MILLION, 8 * 8192, False)
    assert size(max_model_len=1000, max_num_seqs=3) == (1000, 24, True)


def test_pages_are_at_most_those_that_memory_holds(caplog: pytest.LogCaptureFixture) -> None:
    assert size(CacheRoom(10_000_000, 1000)) == (MILLION, 10_000, False), "one full request fits, eight do not"
    assert not caplog.text
    assert size(CacheRoom(5_000_000, 1000)) == (5000 * 128, 5000, True)
    said = "max_model_len is 640000, the model's limit is 1048576: memory has room for no more (5.0 MB free, 8 bytes"
    assert said in caplog.text


def test_what_is_asked_for_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    little = CacheRoom(5_000_000, 1000)
    assert size(little, max_model_len=MILLION) == (MILLION, 8192, False), "a request of the limit can run alone"
    assert size(little, num_pages=20_000) == (MILLION, 20_000, False)
    assert size(little, num_pages=100) == (12_800, 100, True)
    assert size(CacheRoom(0, 1000)) == (128, 1, True)
    assert caplog.text.count("memory has room for no more") == 1
    for options, words in (
        ({"max_model_len": MILLION + 1}, rf"max_model_len is {MILLION + 1}; allowed: \[2, {MILLION}\] \(the model's"),
        ({"max_model_len": 129, "num_pages": 1}, r"allowed: \[2, 128\] \(the cache has num_pages = 1 of 128 tokens\)"),
    ):
        with pytest.raises(ValueError, match=words):
            size(little, **options)


def test_the_room_is_what_the_analysis_counts_beside_state_and_weights() -> None:
    """Ten thousand pages exactly, with the numbers of dsv4.analysis."""
    config = replace(NANO, num_hidden_layers=NANO.num_hidden_layers)
    per_page = cache_bytes(config, 128, "bf16").growing * 2
    fixed = cache_bytes(config, 0, "bf16")
    mtp = NANO.sliding_window * NANO.head_dim * 4
    copies = 8  # of requests that gave way
    state = (3 + copies) * (2 * fixed.windows + fixed.states + mtp)
    memory = Memory(state + 5_000_000 + -(-10_000 * per_page * 10 // 9), 1 << 40, "this machine")
    room = room_for(config, "fp32", 3, 5_000_000, memory)
    assert (room.page_bytes, room.num_pages) == (per_page, 10_000)
    assert room_for(config, "fp32", 3, 1 << 40, memory).num_pages > 10_000, "weights beyond memory are not kept in it"
    streams = replace(memory, available=memory.available + 3 * 777)
    assert room_for(config, "fp32", 3, 5_000_000, streams, streams=777) == room
    more = room_for(config, "fp32", 20, 0, Memory(1 << 40, 1 << 40, "this machine"))
    less = room_for(config, "fp32", 19, 0, Memory(1 << 40, 1 << 40, "this machine"))
    assert less.free - more.free == pytest.approx(0.9 * 2 * state / (3 + copies), abs=2), "beyond 8 each row has a copy"


def test_a_small_memory_lowers_the_limit_of_an_engine_which_still_answers(monkeypatch, caplog) -> None:
    prompt, params = "The cat sat on the mat. " * 40, SamplingParams(max_tokens=3, temperature=0.0)
    want = LLM().generate(prompt, params)[0].token_ids
    monkeypatch.setattr(loading, "host_memory", lambda: Memory(12_000_000, 1 << 40, "this machine"))
    with caplog.at_level(logging.WARNING, "dsv4"):
        llm = LLM(loading.load_model(loading_folder()), folder=loading_folder())
    assert 128 < llm.max_model_len < 100_000 and "memory has room for no more" in caplog.text
    assert llm.max_model_len == llm.cache_size.num_tokens
    assert llm.generate(prompt, params)[0].token_ids == want
    with pytest.raises(ValueError, match=r"it needs \d+ pages of 128 tokens, the cache has \d+$"):
        llm.generate([[5] * (llm.max_model_len + 1)], params)


def loading_folder() -> str:
    from dsv4.config import nano_path

    return str(nano_path())


def test_a_million_tokens_cost_nothing_until_they_come() -> None:
    """Resident memory of two processes that differ in the limit alone, without pages of files: others share those."""
    code = (
        "import sys; from dsv4.engine import LLM; llm = LLM(max_model_len=int(sys.argv[1]));"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'));"
        "print(int(status['RssAnon'].split()[0]) * 1024, llm.cache_size)"
    )

    def resident(length: int) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", code, str(length)], capture_output=True, text=True, check=True)
        number, _, text = done.stdout.strip().partition(" ")
        return int(number), text

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    short, _ = resident(4096)
    long, text = resident(MILLION)
    assert long - short < 20_000_000
    assert text.endswith("8 requests at a time of up to 1,048,576 each")
