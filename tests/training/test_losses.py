"""Losses: targets stay inside their document and inside the mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.training.losses import LossWeights, compute_losses, pack_masks, target_rows


def test_targets_stop_at_the_end_of_each_document() -> None:
    cu_seqlens = torch.tensor([0, 3, 4, 9])
    every = torch.ones(9, dtype=torch.bool)
    assert target_rows(cu_seqlens, every, 1)[0].tolist() == [0, 1, 4, 5, 6, 7]
    assert target_rows(cu_seqlens, every, 2)[0].tolist() == [0, 4, 5, 6]


def test_only_masked_in_tokens_are_targets() -> None:
    cu_seqlens = torch.tensor([0, 4, 7])
    mask = torch.tensor([True, False, True, False, True, True, False])
    rows, targets = target_rows(cu_seqlens, mask, 1)
    # Token 4 opens its document: nothing before it may predict it.
    assert (rows.tolist(), targets.tolist()) == ([1, 4], [2, 5])
    assert target_rows(cu_seqlens, mask, 2)[0].tolist() == [0]


def test_packed_documents_have_the_loss_of_separate_ones(stand_in) -> None:
    model = stand_in()
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 0]]
    masks = [[True] * 5, [True] * 2, [True, False, True, True]]
    parts, mtp_parts, mtp_count, count = 0.0, 0.0, 0, 0
    model.requires_grad_(False)
    for document, mask in zip(documents, masks, strict=True):
        ids = torch.tensor(document)
        streams = model.forward_ragged(RaggedBatch.pack([document]))
        kept = torch.tensor(mask)
        parts += float(F.cross_entropy(model.logits(streams[:-1])[kept[1:]], ids[1:][kept[1:]], reduction="sum"))
        count += int(kept[1:].sum())
        if len(document) > 2:
            mtp = model.mtp_logits(model.mtp_forward(streams[:-2], ids[1:-1], RaggedBatch.pack([document[:-2]])))
            mtp_parts += float(F.cross_entropy(mtp[kept[2:]], ids[2:][kept[2:]], reduction="sum"))
            mtp_count += int(kept[2:].sum())
    model.requires_grad_(True)
    aux = AuxLosses()
    total, losses = compute_losses(model, RaggedBatch.pack(documents), pack_masks(masks), LossWeights(0.3, 0.01), aux)
    assert losses.targets == count
    assert losses.next_token == pytest.approx(parts / count, rel=1e-5)
    assert losses.mtp == pytest.approx(mtp_parts / mtp_count, rel=1e-5)
    expected = losses.next_token + 0.3 * losses.mtp + 0.01 * losses.balance
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_targets_is_refused(stand_in) -> None:
    masks = pack_masks([[True, False], [False]])
    with pytest.raises(ValueError, match="no target"):
        compute_losses(stand_in(), RaggedBatch.pack([[1, 2], [3]]), masks, LossWeights(), AuxLosses())
