"""Faults around the disk cache: what was computed wrongly stays out, and a lost file costs no more than itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4.engine import LLM
from dsv4.engine.errors import EngineError
from dsv4.engine.request import Request
from dsv4.model.transformer import Transformer

from ..model.tiny import random_model
from .prefixes import CONFIG, IDS, assert_nothing_leaks, cache_of, greedy, open_llm, same, stats

CHUNKS: dict[str, Any] = {"snapshot_interval": 256, "max_num_batched_tokens": 300}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG)


def stored(model: Transformer, folder: Path) -> list[Any]:
    """Outputs of a prompt whose prefixes are in `folder`: states at 256, 512, 768, 899 and behind."""
    llm = open_llm(model, folder, **CHUNKS)
    outputs = llm.generate([IDS[:900]], greedy(4))
    llm.close()
    return outputs


def without_folder(model: Transformer, prompt: list[int]) -> list[Any]:
    return LLM(model, enable_prefix_caching=False).generate([prompt], greedy(4))


def test_what_led_to_logits_that_are_no_numbers_is_not_on_disk(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of three chunks leaves NaN in the row, which the last one's logits show."""
    llm = open_llm(model, tmp_path, **CHUNKS)
    llm.generate([IDS[1000:1300]], greedy(4))  # of another request, which is right
    llm.flush()  # what still waits is dropped together with what is wrong
    run, steps = llm.core.runner.run, list[int]()

    def damaged(chunks: Any) -> Any:
        output = run(chunks)
        steps.append(1)
        if len(steps) == 1:
            for layer in cache_of(llm).layers:
                layer.window[chunks[0].request.slot].fill_(float("nan"))
        return output

    with monkeypatch.context() as broken:
        broken.setattr(llm.core.runner, "run", damaged)
        with pytest.raises(EngineError, match="are not finite"):
            llm.generate([IDS[:900]], greedy(4))
    assert len(steps) > 3
    llm.core.abort_all()
    assert same(llm.generate([IDS[:900]], greedy(4)), without_folder(model, IDS[:900]))
    llm.close()
    again = open_llm(model, tmp_path, **CHUNKS)
    for prompt in (IDS[:900], [*IDS[:400], 1, 2, 3]):
        assert same(again.generate([prompt], greedy(4)), without_folder(model, prompt))
    assert again.generate([IDS[1000:1300]], greedy(4))[0].cached_tokens == 299
    again.close()


def test_a_step_that_fails_leaves_what_was_stored_before_it(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = stored(model, tmp_path)
    llm = open_llm(model, tmp_path, **CHUNKS)

    def interrupted(chunks: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(llm.core.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([IDS[:900]], greedy(4))
    llm.core.abort_all()
    got = llm.generate([IDS[:900]], greedy(4))
    assert same(got, want) and got[0].cached_tokens == 899
    llm.close()


@pytest.mark.parametrize("how", ["damaged", "evicted while it waits"])
def test_a_lost_end_leaves_the_beginning(
    how: str, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = stored(model, tmp_path)
    llm = open_llm(model, tmp_path, **CHUNKS)
    llm.flush()
    disk = llm.disk_cache
    assert disk is not None
    load = disk.load

    def lost(match: Any, first: int) -> Any:
        if match.length == 899:
            assert match.state is not None
            file = disk.folder.file(match.state.place.file)
            if how == "damaged":
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data)
            else:
                file.unlink()
        return load(match, first)

    monkeypatch.setattr(disk, "load", lost)
    got = llm.generate([IDS[:900]], greedy(4))
    assert same(got, want) and got[0].cached_tokens == 768
    assert (stats(llm).num_hits, stats(llm).external_prefix_cache_queries) == (1, 899)
    assert_nothing_leaks(llm)
    llm.close()


def test_nothing_is_stored_once_the_weights_files_have_changed(model: Transformer, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path, **CHUNKS)
    request: Request = llm.core.new_request(IDS[:900], greedy(4))
    llm.core.add(request)
    llm.core.step()
    manager = llm.core.scheduler.cache_manager
    manager.may_store = lambda: False  # within the second between two looks of `check_files`
    while not request.finished:
        llm.core.step()
    llm.close()
    again = open_llm(model, tmp_path, **CHUNKS)
    assert again.generate([IDS[:900]], greedy(4))[0].cached_tokens == 256
    again.close()
