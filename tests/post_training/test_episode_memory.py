"""Memory of a long episode: what it keeps between its turns does not grow with them."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsv4.config import nano_path
from dsv4.engine import SamplingParams
from dsv4.post_training.episodes.environment import EpisodeLimits
from dsv4.post_training.episodes.sampling import sample_episodes
from dsv4.post_training.episodes.trajectory import TrajectoryFiles
from dsv4.post_training.rollouts import DrawnOutput
from dsv4.post_training.sandbox.log import SessionLog
from dsv4.tokenizer.prompts import PromptEncoder

from .goals import Counted

FIRST, LAST = 40, 240  # turns between which memory is measured
MASK, EXPERTS, ENTRIES = 512, (4, 2), (2, 16)  # bytes of a token's mask; shapes of its choices


class Measured(Counted):
    """An environment that measures the memory in use in each call, when nothing of a turn is computed."""

    def __init__(self) -> None:
        super().__init__(0, [])
        self.bytes, self.calls = array("q", bytes(8 * (LAST + 1))), 0

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if self.calls in (FIRST, LAST):
            gc.collect()
        self.bytes[self.calls] = tracemalloc.get_traced_memory()[0]
        self.calls += 1
        return "done"


class Talkative:
    """A policy that calls a tool in each turn, with a mask, experts and entries of each token, new ones each time."""

    max_model_len = 1 << 20

    def __init__(self) -> None:
        self.prompts = PromptEncoder.from_pretrained(nano_path())
        self.tokenizer, self.config = self.prompts.tokenizer, SimpleNamespace(eos_token_ids=(1,))
        self.turn = [*self.tokenizer.encode("Look again."), 1]

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        ((prompt,), turn) = prompts, self.turn
        found = DrawnOutput([], turn, logprobs=[-0.5] * len(turn), finish_reason="stop", drawn_by=((7, len(turn)),))
        found.sampling_masks = [bytes([place]) * MASK for place in range(len(turn))]
        known = len(prompt) + len(turn) - 1  # of which no memory is taken here
        found.routed_experts = np.broadcast_to(np.int16(len(prompt) % 251), (known, *EXPERTS))
        found.indexer_topk = np.broadcast_to(np.int32(len(prompt)), (known, *ENTRIES))
        return [found]


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("chatty", "tracing")
def test_an_episode_keeps_nothing_in_memory_that_grows_with_its_turns(tmp_path: Path) -> None:
    goal, policy, limits = Measured(), Talkative(), EpisodeLimits(turns=LAST + 1, tokens=1 << 20)
    files = TrajectoryFiles(tmp_path / "episodes")
    (found,) = sample_episodes(policy, [(0, goal)], 1, SamplingParams(max_tokens=64), 1, limits, files)  # pyright: ignore
    sampled = len(policy.turn) * (LAST + 1)
    assert (found.turns, found.num_tokens, found.drawn_by) == (LAST + 1, sampled, ((7, sampled),))
    assert goal.bytes[LAST] - goal.bytes[FIRST] < 4096, "a turn has 3 KB of masks, and more of choices"

    spans, document, choices = found.spans, found.document, found.choices
    assert choices is not None and choices.experts is not None and choices.entries is not None
    assert len(document) == len(choices) + 1 and found.token_ids == policy.turn * (LAST + 1)
    assert found.sampling_masks[-1] == bytes([len(policy.turn) - 1]) * MASK
    for turn in (0, 1, LAST):  # choices are of the turn that computed a token first
        start, stop = spans[turn]
        assert (choices.entries[stop - 2, 0, 0], choices.experts[stop - 2, 3, 1]) == (start, start % 251)
    found.release()
    assert not list((tmp_path / "episodes").iterdir()) and found.num_tokens == sampled


@pytest.mark.usefixtures("tracing")
def test_the_log_of_a_session_keeps_nothing_in_memory_that_grows_but_places(tmp_path: Path) -> None:
    log, used = SessionLog(tmp_path / "log.jsonl"), array("q", bytes(8 * (LAST + 1)))
    for place in range(LAST + 1):
        step = log.begin({"do": "exec", "asked": f"cat {place}"})
        log.end(step, {"result": str(place) * 4096})
        used[place] = tracemalloc.get_traced_memory()[0]
    assert used[LAST] - used[FIRST] < 64 * (LAST - FIRST), "a step has some KB"
    log.close()
    before = tracemalloc.get_traced_memory()[0]
    again = SessionLog(tmp_path / "log.jsonl")
    assert tracemalloc.get_traced_memory()[0] - before < 64 * LAST and len(again) == LAST + 1
    step = again.step(LAST)
    assert step.earlier and step.describe() == f"exec cat {LAST}"
    assert step.ended is not None and step.ended["result"] == str(LAST) * 4096
    again.close()
