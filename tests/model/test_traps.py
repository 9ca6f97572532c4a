"""Mistakes that other implementations of V4 shipped, one test each; the whole model against a float64 restatement.

Each test of a mistake asserts two facts: the model agrees with the restatement of the description (1e-5 of the largest
logit), and the same restatement with that one mistake is far from it. The model therefore cannot have the mistake.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.cache import Cache
from dsv4.config import ModelConfig, YarnScaling
from dsv4.model.batch import RaggedBatch
from dsv4.model.moe import Gate
from dsv4.model.stacks import official_tensors
from dsv4.model.transformer import Transformer

from .restatement import Restatement
from .tiny import deviation, random_ids, random_model, tiny_config

AGREES, DIFFERS = 1e-5, 2e-3
LENGTH = 141

# Clamps that take effect, a noticeable eps, few Sinkhorn rounds (many would converge), and one index head: half of its
# scores are then exactly 0, so that ties decide which entries are read.
CONFIG = tiny_config(
    swiglu_limit=0.5,
    hc_eps=0.02,
    hc_sinkhorn_iters=3,
    index_n_heads=1,
    index_topk=6,
    rope_scaling=YarnScaling(factor=8, original_max_position_embeddings=64),
)


@dataclass
class Case:
    model: Transformer
    ids: Tensor
    streams: Tensor
    logits: Tensor
    mtp: Tensor


@cache
def case() -> Case:
    model, ids = random_model(CONFIG), random_ids(CONFIG, LENGTH)
    table = model.get_buffer("layers.0.ffn.gate.tid2eid")
    table[:, 1] = torch.where(torch.arange(len(table)) % 3 == 0, table[:, 0], table[:, 1])  # repeated experts
    with torch.no_grad():
        streams = model.forward_ragged(RaggedBatch.pack([ids.tolist()]))
        drafted = model.mtp_forward(streams[:-1], ids[1:], RaggedBatch.pack([ids[:-1].tolist()]))
        return Case(model, ids, streams, model.logits(streams), model.mtp_logits(drafted))


def restated(mistake: str = "", config: ModelConfig = CONFIG) -> tuple[Tensor, Tensor, Restatement]:
    """(logits, MTP logits, the restatement) of the case's ids."""
    c = case()
    r = Restatement(official_tensors(c.model.state_dict()), config, mistake)
    h = r.streams(c.ids.numpy())
    return torch.from_numpy(r.logits(h)), torch.from_numpy(r.mtp(h[:-1], c.ids[1:].numpy())), r


@cache
def right() -> tuple[Tensor, Tensor, Restatement]:
    return restated()


MAIN = [
    # 1. CSA and HCA layers rotate everything with the compressed base and YaRN, window layers use neither.
    "YaRN in window layers",
    "no YaRN in compressed layers",
    "base theta for window keys of compressed layers",
    # 2. YaRN does not scale magnitudes.
    "YaRN scales magnitudes",
    # 3. Trailing channels, pairs, the inverse rotation of the output, the entry's position.
    "rotary channels lead",
    "rotary halves, not pairs",
    "output not rotated back",
    "entry position at the window's end",
    # 4. mHC.
    "combine matrix not transposed",
    "pre without eps",
    "post not doubled",
    "post with eps",
    "softmax without eps",
    "first column step left out",
    "a row and column pass too many",
    # 5. CSA overlap.
    "no overlap",
    "overlap halves swapped",
    "first window's missing half counts",
    "ape left out",
    "ape added to the values too",
    # 6. Causality among entries.
    "entry seen before its window closes",
    "entry hidden from its last token",
    # 7. Ties.
    "ties to the higher index",
    "indexer without relu",
    # 8. Hash routing.
    "a repeated expert counts twice",
    "hash layers weigh evenly",
    # 9. The router.
    "bias in the weights",
    "bias left out of the choice",
    "weights not normalized",
    "weights not scaled",
    # 10. The clamp.
    "gate clamped from below too",
    "up clamped from above only",
    "shared expert not clamped",
    # Attention in general.
    "no norm of query heads",
    "no sink",
    "sink scaled",
    "window of 129",
]
MTP = [  # 12
    "MTP embeds the current token",
    "MTP reads the mean stream",
    "MTP embedding joins the first stream only",
    "MTP uses the main read-out",
    "MTP uses the main norm",
]


def test_every_mistake_of_the_restatement_is_listed() -> None:
    assert right()[2].asked == {*MAIN, *MTP}


@pytest.mark.parametrize("mistake", MAIN)
def test_the_main_model_does_not_have_the_mistake(mistake: str) -> None:
    assert deviation(case().logits, right()[0]) < AGREES
    assert deviation(case().logits, restated(mistake)[0]) > DIFFERS


@pytest.mark.parametrize("mistake", MTP)
def test_mtp_does_not_have_the_mistake(mistake: str) -> None:
    assert deviation(case().mtp, right()[1]) < AGREES
    assert deviation(case().mtp, restated(mistake)[1]) > DIFFERS


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 259])
def test_the_whole_model_equals_the_restatement_at_odd_lengths(length: int) -> None:
    """Another schedule without mistakes: HCA first, several hash layers, all entries read."""
    config = tiny_config(schedule=(128, 4, 0, 4, 128), num_hash_layers=2, index_topk=64, rope_scaling=None)
    model, ids = random_model(config, seed=length), random_ids(config, length, seed=length)
    r = Restatement(official_tensors(model.state_dict()), config)
    with torch.no_grad():
        got = model(ids[None])[0]
    assert deviation(got, torch.from_numpy(r.logits(r.streams(ids.numpy())))) < AGREES


def test_shipped_numerics_follow_the_restatement() -> None:
    """FP8 keys and linear inputs, Hadamard and FP4 in the indexer, against the restatement with its own tables.

    A value that fp32 and float64 round to different sides of a tie moves by one code, so the typical deviation is
    compared with the effect of the quantization itself.
    """
    config = replace(CONFIG, index_topk=64)
    ids = random_ids(config, LENGTH)
    model = random_model(config, numerics="shipped")
    with torch.no_grad():
        got = model(ids[None])[0].double()
    logits = []
    for shipped in (True, False):
        r = Restatement(official_tensors(model.state_dict()), config, shipped=shipped)
        logits.append(torch.from_numpy(r.logits(r.streams(ids.numpy()))))
    apart, effect = (got - logits[0]).abs(), (logits[1] - logits[0]).abs()
    assert effect.median() > 0.01
    assert apart.median() < 0.05 * effect.median()


@pytest.mark.parametrize("schedule", [(0,), (4,), (4, 4)])
def test_shipped_numerics_of_few_layers_exactly(schedule: tuple[int, ...]) -> None:
    """Without a cascade of roundings nearly all tokens agree to fp32 rounding: every site is right, MTP included.

    The seed is one without a tie: a channel within an fp32 rounding of the middle between two FP8 codes, as one at the
    input of h_proj with seed 0, may get the other code, which the tokens that see this one's key show too."""
    config = tiny_config(schedule=schedule, num_hash_layers=0, index_topk=3)
    ids, model = random_ids(config, 61, seed=3), random_model(config, seed=3, numerics="shipped")
    r = Restatement(official_tensors(model.state_dict()), config, shipped=True)
    h = r.streams(ids.numpy())
    with torch.no_grad():
        streams = model.forward_ragged(RaggedBatch.pack([ids.tolist()]))
        drafted = model.mtp_forward(streams[:-1], ids[1:], RaggedBatch.pack([ids[:-1].tolist()]))
        logits, mtp = model.logits(streams).double(), model.mtp_logits(drafted).double()
    for got, want in ((logits, r.logits(h)), (mtp, r.mtp(h[:-1], ids[1:].numpy()))):
        apart = (got - torch.from_numpy(want)).abs().amax(-1)
        assert (apart < 1e-5).float().mean() > 0.95


# 6. Causality, of the model itself


@pytest.mark.parametrize("changed", [3, 63, 127, 128])
def test_no_token_sees_a_later_one(changed: int) -> None:
    model, ids = case().model, case().ids.clone()
    ids[changed] = (ids[changed] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        logits = model(ids[None])[0]
    assert torch.equal(logits[:changed], case().logits[:changed])
    assert not torch.equal(logits[changed], case().logits[changed])


# 8. The hash table


def test_hash_table_is_an_integer_tensor_of_the_state_and_no_cast_touches_it() -> None:
    model = random_model(CONFIG)
    table = model.state_dict()["layers.0.ffn.gate.tid2eid"].clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model.layers[0].ffn.gate.tid2eid.dtype == torch.int64
        assert torch.equal(model.state_dict()["layers.0.ffn.gate.tid2eid"], table)
    other = Transformer(CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.layers[0].ffn.gate.tid2eid, table)


# 9. The router


def test_router_works_in_fp32_for_any_storage_dtype() -> None:
    gate = Gate(CONFIG, hashed=False).to(torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=g))
        assert gate.bias is not None
        gate.bias.zero_()
        x = torch.randn(9, CONFIG.hidden_size, generator=g).bfloat16()
        weights, _, scores = gate(x, torch.zeros(9, dtype=torch.int64))
    want = np.sqrt(np.logaddexp(0, x.double().numpy() @ gate.weight.detach().double().numpy().T))
    assert scores.dtype == weights.dtype == torch.float32
    assert np.abs(scores.double().numpy() - want).max() < 1e-5
    assert torch.allclose(weights.sum(-1), torch.tensor(CONFIG.routed_scaling_factor))


# 11. The schedule's last entry


def test_last_compress_ratio_belongs_to_the_mtp_block() -> None:
    model = case().model
    assert len(CONFIG.compress_ratios) == len(model.layers) + len(model.mtp)
    assert [layer.ratio for layer in model.layers] == list(CONFIG.compress_ratios[:-1])
    assert model.mtp[0].ratio == 0 and model.mtp[0].attn.compressor is None
    assert model.mtp[0].ffn.gate.bias is not None  # score routing


# 12. MTP


def test_mtp_is_in_the_state_and_owns_its_read_out() -> None:
    names = set(case().model.state_dict())
    for part in ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight", "hc_head_fn"):
        assert f"mtp.0.{part}" in names
    assert not {n for n in names if n.startswith("mtp.0.") and ("embed" in n or n.startswith("mtp.0.head"))}


# 13. Packing


def test_packed_sequences_share_no_window() -> None:
    """Lengths are not multiples of 4 or 128: windows laid over the packed row would mix neighboring sequences."""
    model, ids = case().model, case().ids.tolist()
    parts = [ids[:5], ids[5:6], ids[6:139], ids[139:]]
    with torch.no_grad():
        packed = model.logits(model.forward_ragged(RaggedBatch.pack(parts)))
        alone = torch.cat([model(torch.tensor([part]))[0] for part in parts])
    assert deviation(packed, alone) < AGREES
    assert deviation(packed, case().logits) > DIFFERS  # one long sequence gives other logits


# 14. Rollback


def forget_window(cache: Cache, kept: Cache) -> None:
    for layer, old in zip(cache.layers, kept.layers, strict=True):
        layer.window.copy_(old.window)


def forget_rows(cache: Cache, kept: Cache, index: bool) -> None:
    for layer, old in zip(cache.layers, kept.layers, strict=True):
        state, before = (layer.index, old.index) if index else (layer.main, old.main)
        if state is not None and before is not None:
            state.kv.copy_(before.kv)
            state.score.copy_(before.score)


def copy_of(cache: Cache, config: ModelConfig) -> Cache:
    other = Cache(config, cache.batch_size, cache.max_tokens, torch.device("cpu"), torch.float32)
    forget_window(other, cache)
    forget_rows(other, cache, index=False)
    forget_rows(other, cache, index=True)
    return other


@pytest.mark.parametrize("forgotten", ["nothing", "window", "compressor rows", "indexer rows"])
def test_rollback_restores_everything_together(forgotten: str) -> None:
    """Draft 6 wrong tokens over a boundary of 4 and of 128, roll back, continue: logits as without the draft."""
    model, ids = case().model, case().ids
    cache = model.new_cache(1, 256)
    with torch.no_grad():
        model(ids[None, :126], cache)
        snap = cache.snapshot(0)
        model(random_ids(CONFIG, 1, 6, seed=9), cache)
        drafted = copy_of(cache, CONFIG)
        cache.restore(0, snap)
        if forgotten == "window":
            forget_window(cache, drafted)
        elif forgotten != "nothing":
            forget_rows(cache, drafted, index=forgotten == "indexer rows")
        logits = model(ids[None, 126:], cache)[0]
    if forgotten == "nothing":
        assert deviation(logits, case().logits[126:]) < AGREES
    else:
        assert deviation(logits, case().logits[126:]) > DIFFERS


# 20. Scales


def test_a_power_of_two_passes_through_fake_quantization() -> None:
    """An E8M0 scale has no mantissa: quantizing 2^k times a vector gives 2^k times the result."""
    from dsv4.kernels.quant import fake_quant_fp4, fake_quant_fp8

    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    for k in (-3, 1, 6):
        assert torch.equal(fake_quant_fp8(x * 2.0**k, 64), fake_quant_fp8(x, 64) * 2.0**k)
        assert torch.equal(fake_quant_fp4(x * 2.0**k), fake_quant_fp4(x) * 2.0**k)
