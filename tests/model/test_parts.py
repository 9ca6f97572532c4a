"""Small parts on their own: row gathers, initial weights, the batch."""

import pytest
import torch

from dsv4.kernels.gather import take_rows
from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from ..kernels.tools import check_derivatives, noise
from .tiny import random_ids, tiny_config


@pytest.mark.parametrize("shape", [(9, 4), (9, 2, 3)])
def test_take_rows_and_its_gradient_follow_indexing(shape: tuple[int, ...]) -> None:
    index = torch.tensor([[0, 8, 8], [3, 0, 8]])
    check_derivatives(lambda x: take_rows(x, index), lambda x: x[index], (noise(*shape),))


def test_initial_weights_make_a_plain_residual_model() -> None:
    """Streams stay nearly equal copies, logits are small, the same generator gives the same weights."""
    config = tiny_config()
    model, again = Transformer(config), Transformer(config)
    for m in (model, again):
        m.init_weights(torch.Generator().manual_seed(5))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all(), name
    assert torch.equal(model.layers[0].ffn.gate.tid2eid, again.layers[0].ffn.gate.tid2eid)
    with torch.no_grad():
        streams = model.forward_ragged(RaggedBatch.pack([random_ids(config, 140).tolist()]))
        assert (streams - streams.mean(1, keepdim=True)).abs().max() < 0.05 * streams.abs().max()
        assert model.logits(streams).abs().max() < 2


def test_packed_sequences_have_positions_from_their_starts() -> None:
    batch = RaggedBatch.pack([[5, 6, 7], [8], [9, 10]], starts=[0, 41, 7], slots=[2, 0, 1])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.positions.tolist() == [0, 1, 2, 41, 7, 8]
    assert (batch.num_tokens, batch.num_seqs, batch.slots.tolist()) == (6, 3, [2, 0, 1])


def test_bfloat16_model_is_near_the_float_one() -> None:
    """Whole, in cached chunks, and with gradients: every module works in a model cast as a whole."""
    config = tiny_config()
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(1))
    ids = random_ids(config, 1, 150)
    with torch.no_grad():
        want = model(ids)
        model.to(torch.bfloat16)
        got, cache = model(ids), model.new_cache(1, 150)
        chunked = torch.cat([model(part, cache) for part in ids.split((3, 130, 17), dim=1)], dim=1)
    assert got.dtype == chunked.dtype == torch.float32
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    assert (chunked - want).abs().max() < 0.1 * want.abs().max()
    aux = AuxLosses()
    streams = model.forward_ragged(RaggedBatch.pack(ids.tolist()), aux=aux)
    (model.logits(streams).square().mean() + aux.balance_loss + aux.indexer_loss).backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("mtp.")]
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in trained)
