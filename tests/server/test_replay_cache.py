"""Tokens that a later turn of a conversation takes from the cache: all that the earlier ones have computed.

The model has V4's cache; what it samples is scripted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe
import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.engine import LLM
from dsv4.model.batch import RaggedBatch
from dsv4.tokenizer.special import ASSISTANT
from tests.server.conftest import Served, serving
from tests.server.scripted_model import EOS, VOCAB
from tests.server.test_replay import PROTOCOLS, REPLIES, STREAMED, Protocol

from ..model.tiny import random_model, tiny_config


class Scripted:
    """Replaces a model's logits: after each beginning of a turn come the tokens of `reply`."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.reply = ""
        self._tokenizer = recipe.Tokenizer.from_file(str(folder / "tokenizer.json"))
        (self._begin,) = self._tokenizer.encode(ASSISTANT)
        self._since: dict[int, int] = {}  # tokens after the last beginning of a turn, by row
        self._compute = model.next_token_logits
        model.next_token_logits = self.next_token_logits

    def next_token_logits(self, batch: RaggedBatch, cache: Any, rows: np.ndarray, *more: Any, **options: Any) -> Tensor:
        logits = self._compute(batch, cache, rows, *more, **options)
        ids, after = batch.token_ids.tolist(), []
        for length, slot in zip(batch.lengths.tolist(), batch.slots.tolist(), strict=True):
            for _ in range(length):
                self._since[slot] = 0 if ids.pop(0) == self._begin else self._since.get(slot, 0) + 1
                after.append(self._since[slot])
        script = self._tokenizer.encode(self.reply)
        chosen = [script[after[row] - 1] if after[row] - 1 < len(script) else EOS for row in rows]
        return 50.0 * torch.nn.functional.one_hot(torch.tensor(chosen, dtype=torch.long), VOCAB).to(logits)


@pytest.fixture(params=[None, 0], ids=["replayed", "as sent"])
def cached(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Served, Scripted, bool]]:
    config = tiny_config(schedule=(0, 4, 128, 4), index_topk=16, max_position_embeddings=8192, vocab_size=VOCAB)
    with torch.no_grad():
        model = random_model(config)
    scripted = Scripted(model, folder)
    options = {} if request.param is None else {"turn_memory_bytes": request.param}
    with serving(LLM(model, folder=folder, max_num_seqs=2), **options) as served:
        yield served, scripted, request.param is None


@PROTOCOLS
@STREAMED
def test_a_second_turn_computes_only_what_is_new(cached: Any, protocol: Protocol, streamed: bool) -> None:
    """A client without memory of reasoning, which writes arguments anew. Without replay the prompt is read again."""
    served, scripted, replays = cached
    scripted.reply = REPLIES["other order"]
    history, (prompt, hit, answer) = protocol(served, [], streamed, thinking=True)
    assert hit < prompt
    served.wait_until_idle()
    scripted.reply = "So.</think>It is sunny."
    history, (second, hit, said) = protocol(served, history, streamed, thinking=True)
    assert (hit >= prompt + answer - 1) is replays, (prompt, answer, hit)
    served.wait_until_idle()
    _, (third, hit, _) = protocol(served, history, streamed, thinking=True)
    assert (hit >= second + said - 1) is replays, (second, said, hit)
    assert third > second > prompt
