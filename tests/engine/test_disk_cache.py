"""Prefixes on disk: a hit has the bits of a miss, in this process and in the next, and what goes wrong is a miss."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.cache.disk.folder import CacheFolder
from dsv4.engine import LLM
from dsv4.kernels import backends
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import (
    BITS,
    CONFIG,
    IDS,
    assert_nothing_leaks,
    cache_of,
    greedy,
    open_llm,
    prompt_of,
    same,
    sampled,
    stats,
    step_until_it_begins,
)

DEPTH = 512  # tokens that "zero" computes again: 4 layers of 128
WINDOWS = ("full", "periodic:100", "periodic:256", "zero")
LENGTHS = (129, 131, 132, 133, 255, 256, 257, 640, 641, 643, 644, 768, 769, 900)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


def expected(window: str, length: int) -> int:
    """Tokens of a prompt that come from the disk after a restart; a gain of less than a block is none."""
    cached = length - 1
    if window == "zero":
        cached = cached // 128 * 128 - DEPTH
    elif window != "full":
        period = int(window.removeprefix("periodic:"))
        cached -= cached % period
    return cached if cached >= 128 else 0


@pytest.mark.parametrize("window", WINDOWS)
def test_a_hit_gives_the_bits_of_a_miss(each_model: Transformer, path: str, window: str, tmp_path: Path) -> None:
    lengths = LENGTHS if path == "native" else LENGTHS[::3]
    prompts = [prompt_of(length) for length in lengths]
    params = [greedy(4) if length % 2 else sampled(length, 4) for length in lengths]
    want = LLM(each_model, enable_prefix_caching=False).generate(prompts, params)
    first = open_llm(each_model, tmp_path, window, max_num_batched_tokens=300)
    assert same(first.generate(prompts, params), want)
    first.close()
    again = open_llm(each_model, tmp_path, window)
    one_by_one = [again.generate([prompt], param)[0] for prompt, param in zip(prompts, params, strict=True)]
    assert same(one_by_one, want)
    assert [o.cached_tokens for o in one_by_one] == [expected(window, length) for length in lengths]
    together = open_llm(each_model, tmp_path, window, max_num_batched_tokens=200, max_num_seqs=3)
    assert same(together.generate(prompts, params), want)
    assert stats(together).kv_offload_load_bytes > 0
    for llm in (again, together):
        llm.close()
        assert_nothing_leaks(llm)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_conversation_goes_on_after_a_restart(model: Transformer, window: str, tmp_path: Path) -> None:
    prompt = IDS[:700]
    first = open_llm(model, tmp_path, window)
    answer = first.generate([prompt], greedy(30))[0].token_ids
    first.close()
    prompt = [*prompt, *answer, *IDS[800:840]]
    want = LLM(model, enable_prefix_caching=False).generate([prompt], greedy())
    second = open_llm(model, tmp_path, window)
    got = second.generate([prompt], greedy())
    assert same(got, want)
    ends = {"full": 729, "periodic:100": 700, "periodic:256": 512, "zero": 640 - DEPTH}
    assert got[0].cached_tokens == ends[window]
    assert second.generate([[*prompt, 5]], greedy())[0].cached_tokens == len(prompt), "from memory"
    second.close()


def test_a_beginning_that_others_share_is_stored_over_restarts(model: Transformer, tmp_path: Path) -> None:
    prompts = [IDS[:400] + IDS[i : i + 50] for i in (500, 600, 700)]
    cached: list[int] = []
    for prompt in prompts:
        llm = open_llm(model, tmp_path)
        cached.append(llm.generate([prompt], greedy())[0].cached_tokens)
        llm.close()
    assert cached == [0, 0, 384], "the second computes through the place where it leaves the first"


def test_what_memory_has_is_not_read(model: Transformer, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path)
    llm.generate([IDS[:700]], greedy())
    llm.flush()
    assert llm.generate([IDS[:700]], greedy())[0].cached_tokens == 699
    assert stats(llm).kv_offload_load_bytes == 0
    other = open_llm(model, tmp_path)
    other.generate([IDS[:256] + IDS[900:910]], greedy())
    loaded = stats(other).kv_offload_load_bytes
    assert other.generate([IDS[:700]], greedy())[0].cached_tokens == 699
    page = cache_of(other).page_bytes
    state = cache_of(other).snapshot(0).num_bytes
    assert stats(other).kv_offload_load_bytes - loaded < state + 4 * (page + 200) + 5000, "three blocks and a tail"
    llm.close()
    other.close()


def test_salts_models_and_numerics_share_nothing(model: Transformer, tmp_path: Path) -> None:
    first = open_llm(model, tmp_path)
    first.generate([IDS[:300]], greedy(cache_salt="a"))
    first.close()
    again = open_llm(model, tmp_path)
    assert [again.generate([IDS[:300]], greedy(cache_salt=s))[0].cached_tokens for s in (None, "b", "a")] == [0, 0, 299]
    again.close()
    with torch.no_grad():
        others = [random_model(CONFIG, seed=1), random_model(CONFIG, numerics="shipped")]
    for other in others:
        llm = open_llm(other, tmp_path)
        want = LLM(other, enable_prefix_caching=False).generate([IDS[:300]], greedy())
        got = llm.generate([IDS[:300]], greedy(cache_salt="a"))
        assert got[0].cached_tokens == 0 and same(got, want)
        llm.close()


def test_kernels_that_round_otherwise_share_nothing(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backends.native_module() is None:
        pytest.skip("the reference alone")
    native = open_llm(model, tmp_path)
    native.generate([IDS[:300]], greedy())
    native.close()
    monkeypatch.setattr(backends, "native_module", lambda: None)
    reference = open_llm(random_model(CONFIG), tmp_path)
    assert reference.generate([IDS[:300]], greedy())[0].cached_tokens == 0
    reference.close()


def test_prefixes_of_former_weights_are_not_found(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    llm = open_llm(model, tmp_path)
    llm.generate([IDS[:300]], greedy())
    llm.flush()
    llm.reset_prefix_cache()
    assert llm.generate([IDS[:300]], greedy())[0].cached_tokens == 299, "from disk: the weights are the same"
    with torch.no_grad():
        model.head.weight.mul_(-1.0)
    model.refresh()
    got = llm.generate([IDS[:300]], greedy())
    assert got[0].cached_tokens == 0
    assert same(got, LLM(model, enable_prefix_caching=False).generate([IDS[:300]], greedy()))
    llm.close()


def test_a_damaged_file_is_computed_instead(
    model: Transformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = LLM(model, enable_prefix_caching=False).generate([IDS[:600]], greedy())
    for place in (0, 50, 1000, -1):
        first = open_llm(model, tmp_path / str(place))
        first.generate([IDS[:600]], greedy())
        first.close()
        for file in (tmp_path / str(place) / "v1" / "entries").iterdir():
            data = bytearray(file.read_bytes())
            data[place] ^= 1
            file.write_bytes(data)
        caplog.clear()
        llm = open_llm(model, tmp_path / str(place))
        got = llm.generate([IDS[:600]], greedy())
        assert got[0].cached_tokens == 0 and same(got, want) and len(caplog.records) == 1
        llm.close()
        assert_nothing_leaks(llm)
        after = open_llm(model, tmp_path / str(place))
        assert after.generate([IDS[:600]], greedy())[0].cached_tokens == 599, "it was stored anew"
        after.close()


def test_a_damaged_file_is_replaced_though_the_writer_waits(model: Transformer, tmp_path: Path) -> None:
    first = open_llm(model, tmp_path)
    first.generate([IDS[:600]], greedy())
    first.close()
    for file in (tmp_path / "v1" / "entries").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    llm = open_llm(model, tmp_path)
    llm.flush()
    with CacheFolder(tmp_path).lock():  # the index has the file until the writer has it
        assert llm.generate([IDS[:600]], greedy())[0].cached_tokens == 0
    llm.close()
    after = open_llm(model, tmp_path)
    assert after.generate([IDS[:600]], greedy())[0].cached_tokens == 599
    after.close()


def test_a_state_of_another_form_is_a_miss(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_llm(model, tmp_path)
    first.generate([IDS[:300]], greedy())
    first.close()
    llm = open_llm(model, tmp_path)

    def refuse(*_: object) -> None:
        raise ValueError("snapshot of another model")

    with monkeypatch.context() as broken:
        broken.setattr(cache_of(llm), "restore", refuse)
        assert llm.generate([IDS[:300]], greedy())[0].cached_tokens == 0
    llm.close()
    assert_nothing_leaks(llm)


@pytest.mark.parametrize("window", ["full", "zero"])
def test_cancelling_and_giving_way_release_what_was_loaded(model: Transformer, window: str, tmp_path: Path) -> None:
    first = open_llm(model, tmp_path, window)
    want = first.generate([IDS[:900]], greedy(40))
    first.close()
    llm = open_llm(model, tmp_path, window, max_num_batched_tokens=100)
    request = llm.core.new_request(IDS[:900], greedy(40))
    llm.core.add(request)
    step_until_it_begins(llm, request)
    assert request.output.cached_tokens == expected(window, 900)
    assert cache_of(llm).is_replaying(request.slot) == (window == "zero")
    llm.core.abort(request)
    assert_nothing_leaks(llm)
    request = llm.core.new_request(IDS[:900], greedy(40))
    llm.core.add(request)
    step_until_it_begins(llm, request)
    llm.core.scheduler._preempt(request)
    while llm.core.has_work:
        llm.core.step()
    assert same([request.output], want)
    assert_nothing_leaks(llm)
    llm.close()


@pytest.mark.parametrize("seed", range(2))
def test_random_requests_have_the_tokens_of_an_engine_without_prefixes(
    model: Transformer, seed: int, tmp_path: Path
) -> None:
    """Engines of all policies over one folder of few bytes, in pools for three full rows, some requests cancelled."""
    r = random.Random(seed)
    starts = [IDS[i : i + r.randint(100, 700)] for i in range(0, 600, 100)]
    asked = []
    for number in range(60):
        tail = [r.randrange(CONFIG.vocab_size) for _ in range(r.choice((0, 1, 5, 60, 200)))]
        prompt = r.choice(starts)[: r.choice((700, 700, 130, 256))] + tail
        params = greedy(r.randint(1, 20)) if number % 2 else sampled(number, r.randint(1, 20))
        asked.append((prompt, params, r.random() < 0.2))
    whole = LLM(model, enable_prefix_caching=False).generate([p for p, *_ in asked], [p for _, p, _ in asked])
    hits = 0
    for part in range(0, 60, 15):
        llm = open_llm(
            model, tmp_path, r.choice(WINDOWS), cache_bytes=4_000_000, max_num_seqs=4, max_model_len=960, num_pages=24,
            max_num_batched_tokens=r.choice((64, 200, 1024)), snapshot_interval=r.choice((100, 256, 4096)),
            prefix_cache_bytes=r.choice((0, 1 << 21, 1 << 30)),
        )  # fmt: skip
        core, coming, requests = llm.core, list(asked[part : part + 15]), []
        while coming or core.has_work:
            for _ in range(min(len(coming), r.choice((0, 0, 1, 3)))):
                prompt, params, cancelled = coming.pop(0)
                requests.append((core.new_request(prompt, params), cancelled))
                core.add(requests[-1][0])
            core.step()
            for request, cancelled in requests:
                if cancelled and not request.finished and r.random() < 0.05:
                    core.abort(request)
        for (request, cancelled), want in zip(requests, whole[part:], strict=False):
            got, count = request.output, len(request.output.token_ids)
            if BITS:
                assert got.token_ids == want.token_ids[:count] and got.logprobs == want.logprobs[:count]
            assert cancelled or same([got], [want])
        llm.close()
        hits += stats(llm).num_hits
        assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= 4_000_000
        assert_nothing_leaks(llm)
    assert hits > 0


CHILD = """
import json, sys, dsv4
text = "The quick brown fox jumps over the lazy dog. " * 40
llm = dsv4.LLM(cache_dir=sys.argv[1])
out = llm.generate([text], dsv4.SamplingParams(max_tokens=8, temperature=0.0, logprobs=True, ignore_eos=True))[0]
print(json.dumps([out.token_ids, out.logprobs, out.cached_tokens, len(out.prompt_token_ids)]))
"""


def test_another_process_goes_on_without_a_call_to_close(tmp_path: Path) -> None:
    """Two at once, then one: what the end of a process has not written, nobody finds."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE)

    def result(process: subprocess.Popen[bytes]) -> list[Any]:
        out, _ = process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    both = [start(), start()]
    one, two = [result(process) for process in both]
    three = result(start())
    assert one[:2] == two[:2] == three[:2]
    assert three[2] == three[3] - 1
    assert not list(tmp_path.rglob("*.tmp"))
