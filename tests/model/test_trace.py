"""The trace of a token against what the model itself computes: choices, weights, experts, logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.config import WINDOW
from dsv4.kernels.attention import reference
from dsv4.model.attention import attention
from dsv4.model.backend import ReferenceBackend
from dsv4.model.batch import RaggedBatch
from dsv4.model.moe import Gate
from dsv4.model.token_trace import TokenTrace
from dsv4.model.trace import covered, trace_token
from dsv4.model.transformer import Transformer
from tests.model.tiny import random_ids, random_model, store, tiny_config

LENGTHS = [1, 5, 36, 131, 300]


def traced(model: Transformer, ids: list[int], chunk: int = 41) -> TokenTrace:
    """Trace of the last token."""
    cache = model.new_cache(1, len(ids))
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : min(start + chunk, len(ids) - 1)]
        model.forward_ragged(RaggedBatch.pack([part], starts=[start]), cache)
    return trace_token(model, cache, ids[-1])


class Recorder:
    """What the model's layers choose and compute for the last token of a whole forward on the reference."""

    def __init__(self, model: Transformer, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[list[int] | None] = []  # of each layer with an indexer
        self.entry_weights: list[Tensor] = []  # of each layer, of the entries that it reads, mean over heads
        self.routing: list[tuple[Tensor, ...]] = []
        with monkeypatch.context() as patch:
            patch.setattr(attention, "select_entries", self._select(attention.select_entries))
            patch.setattr(attention, "attend", self._attend)
            hooks = [
                m.register_forward_hook(lambda _, __, out: self.routing.append(tuple(t[-1] for t in out[:2])))
                for m in model.layers.modules()
                if isinstance(m, Gate)
            ]
            backend = ReferenceBackend(model)
            with torch.inference_mode():
                self.logits = backend.read_out(backend.run(RaggedBatch.pack([ids]), None))[-1]
            for hook in hooks:
                hook.remove()

    def _select(self, select: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            chosen, scores = select(*args)
            self.chosen.append(None if chosen is None else [e for e in chosen[-1].tolist() if e >= 0])
            return chosen, scores

        return wrapped

    def _attend(self, q: Tensor, keys: Any, tiles: Any, sink: Tensor, chosen: Any = None, keep_probs: bool = False):
        out, probs = reference.attend(q, keys, tiles, sink, chosen, keep_probs=True)
        row = int(tiles.token_row[-1])
        rows = tiles.row_token.shape[1]
        group, last = next(
            (g, p.entries()) for g, p in zip(tiles.groups, probs, strict=True) if g.first <= row // rows < g.last
        )
        if last is None:
            self.entry_weights.append(torch.empty(0))
        else:
            mask, _ = group.visible(tiles.rows(chosen, group) if group.sparse else None)
            at = row // rows - group.first, row % rows
            self.entry_weights.append(last[at][mask[at]] / q.shape[1])
        return out, None


@pytest.mark.parametrize("numerics", ["float", "shipped"])
@pytest.mark.parametrize("length", LENGTHS)
def test_trace_is_what_the_model_computes(numerics: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(), seed=3, numerics=numerics)
    ids = random_ids(model.config, length).tolist()
    trace, own = traced(model, ids), Recorder(model, ids, monkeypatch)
    assert trace.position == length - 1
    chosen = iter(own.chosen)
    for layer, weights, (expert_weights, experts) in zip(trace.layers, own.entry_weights, own.routing, strict=True):
        assert (layer.window_start, len(layer.window)) == (max(0, length - WINDOW), min(length, WINDOW))
        of_entries = torch.tensor([entry.weight for entry in layer.entries])
        assert sum(layer.window) + float(of_entries.sum()) + layer.sink == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(of_entries, weights, rtol=1e-4, atol=1e-6)
        read = [entry.index for entry in layer.entries]
        if layer.kind == "csa" and layer.num_visible > model.config.index_topk:
            assert read == next(chosen) and len(read) == model.config.index_topk
            assert all(entry.score is not None for entry in layer.entries)
        else:
            assert read == list(range(layer.num_visible))
            assert all(entry.score is None for entry in layer.entries)
        assert layer.experts == experts.tolist()
        assert layer.expert_weights == pytest.approx(expert_weights.tolist(), rel=1e-4)
    assert [layer.kind for layer in trace.layers] == ["swa", "csa", "hca", "csa"]
    assert [layer.hashed for layer in trace.layers] == [True, False, False, False]
    likely = torch.softmax(own.logits, -1).topk(5)
    assert [token for token, _ in trace.next_tokens] == likely.indices.tolist()
    assert [p for _, p in trace.next_tokens] == pytest.approx(likely.values.tolist(), rel=1e-3)


def test_weights_as_stored_and_bytes_of_the_sequence() -> None:
    model = store(random_model(tiny_config(hidden_size=128, q_lora_rank=128, moe_intermediate_size=64)))
    ids = random_ids(model.config, 140).tolist()
    trace = traced(model, ids)
    cache = model.new_cache(1, 140)
    logits = model.next_token_logits(RaggedBatch.pack([ids]), cache)[-1]
    assert trace.next_tokens[0][0] == int(logits.argmax())
    assert trace.cache_bytes == cache.live_bytes(1) and trace.cache_bytes["entries"] > 0


def test_a_trace_leaves_no_hooks_and_the_bits_as_they_were() -> None:
    model = random_model(tiny_config())
    ids = random_ids(model.config, 50).tolist()
    before = model.next_token_logits(RaggedBatch.pack([ids]))
    traced(model, ids)
    assert not any(module._forward_hooks or getattr(module, "watcher", None) for module in model.modules())
    assert torch.equal(before, model.next_token_logits(RaggedBatch.pack([ids])))


@pytest.mark.parametrize("ratio", [4, 128])
def test_an_entry_covers_the_tokens_that_change_it(ratio: int) -> None:
    model = random_model(tiny_config(schedule=(ratio,)))
    ids = random_ids(model.config, 3 * ratio).tolist()

    def entries(ids: list[int]) -> Tensor:
        cache = model.new_cache(1, len(ids))
        with torch.inference_mode():
            ReferenceBackend(model).run(RaggedBatch.pack([ids]), _reserved(cache, len(ids)))
        main = cache.layers[0].main
        assert main is not None
        return main.format.decode(main.entries[:3])

    whole = entries(ids)
    for place in (0, ratio - 1, ratio, 2 * ratio - 1, 2 * ratio, 3 * ratio - 1):
        changed = entries([*ids[:place], (ids[place] + 1) % model.config.vocab_size, *ids[place + 1 :]])
        differ = [entry for entry in range(3) if not torch.equal(changed[entry], whole[entry])]
        assert differ == [entry for entry in range(3) if place in range(*covered(entry, ratio))]


def _reserved(cache: Any, length: int) -> Any:
    batch = RaggedBatch.pack([[0] * length])
    cache.reserve(batch.slots, batch.starts, batch.lengths)
    return cache
