"""The same model on CUDA: agreement with the CPU, chunking, and a training step."""

import copy

import pytest
import torch

from dsv4.model.aux_losses import AuxLosses
from dsv4.model.batch import RaggedBatch
from dsv4.model.transformer import Transformer

from .tiny import deviation, random_ids, random_model, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = tiny_config(schedule=(0, 4, 128, 4), index_topk=512)


def both(numerics: str = "float") -> tuple[Transformer, Transformer]:
    on_cpu = random_model(CONFIG, numerics=numerics)
    return on_cpu, copy.deepcopy(on_cpu).cuda()


def test_forward_agrees_with_the_cpu() -> None:
    on_cpu, on_gpu = both()
    ids = random_ids(CONFIG, 2, 259)
    with torch.no_grad():
        assert deviation(on_gpu(ids.cuda()).cpu(), on_cpu(ids)) < 1e-4


def test_shipped_numerics_run() -> None:
    _, on_gpu = both("shipped")
    with torch.no_grad():
        assert on_gpu(random_ids(CONFIG, 1, 140).cuda()).isfinite().all()


@pytest.mark.parametrize("chunk", [1, 5, 64, 129])
def test_chunking(chunk: int) -> None:
    _, on_gpu = both()
    ids = random_ids(CONFIG, 2, 150 if chunk == 1 else 389).cuda()
    cache = on_gpu.new_cache(2, 400)
    with torch.no_grad():
        logits = torch.cat([on_gpu(part, cache) for part in ids.split(chunk, dim=1)], dim=1)
        assert deviation(logits, on_gpu(ids)) < 1e-4


def test_snapshot_and_restore() -> None:
    _, on_gpu = both()
    ids = random_ids(CONFIG, 1, 150).cuda()
    cache = on_gpu.new_cache(1, 400)
    with torch.no_grad():
        on_gpu(ids[:, :126], cache)
        snap = cache.snapshot(0)
        on_gpu(ids[:, :7], cache)
        cache.restore(0, snap)
        assert deviation(on_gpu(ids[:, 126:], cache), on_gpu(ids)[:, 126:]) < 1e-4


def test_training_step() -> None:
    """Gradients of all losses agree with the CPU's, and a step lowers the loss."""
    sequences = [random_ids(CONFIG, n, seed=n).tolist() for n in (140, 37)]
    gradients = []
    for model in both():
        batch, aux = RaggedBatch.pack(sequences, device=model.device), AuxLosses()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(2):
            streams = model.forward_ragged(batch, aux=aux)
            after = model.mtp_forward(streams, batch.token_ids.roll(-1), batch, aux=aux)
            loss = torch.nn.functional.cross_entropy(model.logits(streams), batch.token_ids.roll(-1))
            loss = loss + torch.nn.functional.cross_entropy(model.mtp_logits(after), batch.token_ids.roll(-2))
            losses.append(float(loss.detach()))
            if len(losses) == 1:
                (loss + aux.balance_loss + aux.indexer_loss).backward()
                gradients.append({n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None})
                optimizer.step()
        assert losses[1] < losses[0]
    on_cpu, on_gpu = gradients
    assert on_cpu.keys() == on_gpu.keys()
    for name, want in on_cpu.items():
        assert (on_gpu[name] - want).abs().max() < 1e-3 * want.abs().max() + 1e-6, name


def test_the_cache_takes_memory_as_tokens_come() -> None:
    _, on_gpu = both()
    ids = random_ids(CONFIG, 1, 400).cuda()
    free = torch.cuda.memory_allocated()
    cache = on_gpu.new_cache(8, 1 << 20)
    assert torch.cuda.memory_allocated() - free < 1 << 24, "the cache is taken whole"
    cache_of_one = on_gpu.new_cache(1, 400)
    with torch.no_grad():
        together = torch.cat([on_gpu(part.expand(8, -1), cache)[:1] for part in ids.split(129, dim=1)], dim=1)
        alone = torch.cat([on_gpu(part, cache_of_one) for part in ids.split(129, dim=1)], dim=1)
        assert deviation(together, alone) < 1e-4
