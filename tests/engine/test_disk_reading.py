"""While a prefix is read from the disk: others run, and whatever happens meanwhile leaves the bits of a miss."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsv4.cache.disk import reading
from dsv4.engine import LLM
from dsv4.engine.request import RequestStatus
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import (
    CONFIG,
    IDS,
    assert_nothing_leaks,
    greedy,
    open_llm,
    prompt_of,
    same,
    stats,
    step_until_it_begins,
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


class SlowDisk:
    """Holds up all reading of an engine's disk cache until `go`."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.count = threading.Event(), 0
        disk = llm.disk_cache
        assert disk is not None
        load = disk.load

        def slow(*arguments: Any) -> Any:
            self.count += 1
            assert self.go.wait(120)
            return load(*arguments)

        monkeypatch.setattr(disk, "load", slow)


@pytest.fixture
def stored(model: Transformer, tmp_path: Path) -> list[Any]:
    """Outputs of two prompts whose prefixes are in `tmp_path`."""
    llm = open_llm(model, tmp_path)
    outputs = llm.generate([IDS[:900], prompt_of(640)], greedy(10))
    llm.close()
    return outputs


@pytest.mark.parametrize("count", [1, 2])
def test_while_a_prefix_is_read_others_run_and_begin(
    model: Transformer, stored: list[Any], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(model, tmp_path, max_num_seqs=2, num_pages=20, max_model_len=1280)
    core, slow = llm.core, SlowDisk(llm, monkeypatch)
    running = core.new_request(prompt_of(131), greedy(60))
    core.add(running)
    step_until_it_begins(llm, running)
    hits = [core.new_request(prompt, greedy(10)) for prompt in (IDS[:900], prompt_of(640))[:count]]
    for request in hits:
        core.add(request)
    later = core.new_request(prompt_of(77), greedy(10))
    core.add(later)
    while core.scheduler.running:
        core.step()
    assert running.finished and later.finished
    assert [request.status for request in hits] == [RequestStatus.WAITING] * count
    assert slow.count == 1, "one after the other"
    slow.go.set()
    while core.has_work:
        core.step()
    assert same([request.output for request in hits], stored[:count])
    assert [request.output.cached_tokens for request in hits] == [899, 639][:count]
    assert same([later.output], LLM(model).generate([prompt_of(77)], greedy(10)))
    assert_nothing_leaks(llm)
    llm.close()


def test_cancelling_a_request_whose_prefix_is_read_releases_all(
    model: Transformer, stored: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(model, tmp_path, max_num_seqs=1)
    core, slow = llm.core, SlowDisk(llm, monkeypatch)
    doomed, other, next_one = (core.new_request(p, greedy(10)) for p in (IDS[:900], prompt_of(640), IDS[:900]))
    core.add(doomed)
    while not slow.count:
        core.step()
    disk = core.scheduler.cache_manager.disk
    assert disk is not None
    (held,) = disk._readings.values()
    core.abort(doomed)
    assert held.cancelled and not disk._readings
    assert_nothing_leaks(llm)
    core.add(other)
    core.step()
    assert slow.count == 1 and len(disk._readings) == 1
    core.abort(other)
    slow.go.set()
    deadline = time.monotonic() + 60
    while not held.done:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert held.loaded is None
    core.add(next_one)
    while core.has_work:
        core.step()
    assert same([next_one.output], stored[:1]) and next_one.output.cached_tokens == 899
    assert slow.count == 2, "what was cancelled before its turn is not read"
    assert_nothing_leaks(llm)
    llm.close()


def test_a_disk_that_does_not_answer_is_a_miss(
    model: Transformer, stored: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WAIT_SECONDS", 0.05)
    llm = open_llm(model, tmp_path)
    slow = SlowDisk(llm, monkeypatch)
    got = llm.generate([IDS[:900]], greedy(10))
    assert same(got, stored[:1]) and got[0].cached_tokens == 0
    assert stats(llm).num_misses == 1
    slow.go.set()
    assert llm.generate([IDS[:900]], greedy(10))[0].cached_tokens == 899, "from memory"
    assert_nothing_leaks(llm)
    llm.close()


@pytest.mark.parametrize("forgets", [False, True])
def test_what_memory_loses_while_the_rest_is_read_is_read_too(
    model: Transformer, stored: list[Any], forgets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(model, tmp_path)
    llm.generate([IDS[:400] + IDS[1000:1010]], greedy())
    slow = SlowDisk(llm, monkeypatch)
    request = llm.core.new_request(IDS[:900], greedy(10))
    llm.core.add(request)
    while not slow.count:
        llm.core.step()
    if forgets:
        llm.core.reset_prefix_cache()
    else:  # memory has more than when the reading began
        llm.core.add(other := llm.core.new_request([*IDS[:600], 1], greedy(1)))
        while not other.finished:
            llm.core.step()
    slow.go.set()
    while llm.core.has_work:
        llm.core.step()
    assert same([request.output], stored[:1]) and request.output.cached_tokens == 899
    assert slow.count == 1 + forgets
    assert_nothing_leaks(llm)
    llm.close()
