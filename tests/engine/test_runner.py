"""A step's output: logits of every row that yields a token, and residual streams of all rows on request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.engine import SamplingParams
from dsv4.engine.cache_manager import CacheManager
from dsv4.engine.request import Request
from dsv4.engine.runner import ModelRunner
from dsv4.engine.step import ScheduledChunk
from dsv4.model.batch import RaggedBatch

from .conftest import HistoryCache, HistoryModel

CPU = torch.device("cpu")


class StreamingHistoryModel(HistoryModel):
    """Model that also returns streams: each row's streams hold its index in the batch."""

    def next_token_logits_and_streams(
        self, batch: RaggedBatch, cache: HistoryCache, rows: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        streams = torch.arange(batch.num_tokens).float()[:, None, None].expand(-1, 4, 2)
        return self.next_token_logits(batch, cache, rows), streams


def running(model: HistoryModel, *prompts: list[int]) -> tuple[HistoryCache, list[Request]]:
    cache = model.new_cache(len(prompts), 100)
    manager = CacheManager(cache, len(prompts))
    requests = [Request(i, list(prompt), SamplingParams(), 0, frozenset(), 100) for i, prompt in enumerate(prompts)]
    for request in requests:
        assert manager.can_allocate(request)
        manager.allocate(request)
    return cache, requests


@pytest.mark.parametrize("keep_streams", [True, False])
def test_every_row_that_yields_a_token_is_read(keep_streams: bool) -> None:
    model = StreamingHistoryModel()
    cache, (first, second, third) = running(model, [4, 5, 6], [7, 8, 9, 3], [2, 3])
    runner = ModelRunner(model, cache, CPU, keep_streams=keep_streams)
    chunks = [ScheduledChunk(first, 0, 3, (10, 11)), ScheduledChunk(second, 0, 2), ScheduledChunk(third, 0, 2)]
    output = runner.run(chunks)
    histories = [[4, 5, 6], [4, 5, 6, 10], [4, 5, 6, 10, 11], [2, 3]]
    assert torch.equal(output.logits, torch.stack([model.expected_logits(history) for history in histories]))
    assert sorted(cache.lengths) == [2, 2, 5]
    if keep_streams:
        assert output.streams is not None and output.streams[:, 0, 0].tolist() == [*range(9)]
    else:
        assert output.streams is None


def test_a_model_without_streams_gives_logits_alone(model) -> None:
    cache, (request,) = running(model, [4, 5])
    output = ModelRunner(model, cache, CPU, keep_streams=True).run([ScheduledChunk(request, 0, 2)])
    assert output.streams is None and output.logits.shape == (1, 53)


def test_a_row_is_free_and_empty_after_its_request(model) -> None:
    cache = model.new_cache(1, 100)
    manager = CacheManager(cache, 1)
    first, second = (Request(i, [4, 5], SamplingParams(), 0, frozenset(), 100) for i in range(2))
    manager.allocate(first)
    ModelRunner(model, cache, CPU).run([ScheduledChunk(first, 0, 2)])
    assert not manager.can_allocate(second)
    manager.release(first)
    assert manager.can_allocate(second) and cache.lengths == [0] and first.slot == -1
    manager.release(first)  # a request without a slot
    assert cache.resets == [0]
