"""The main model against transformers' DeepseekV4ForCausalLM with the same weights: fp32, float numerics.

Measure: the largest absolute difference of any logit over the largest absolute logit, at most 1e-5 (rounding alone
gives about 1e-6). Names are mapped here, from the published list, not by dsv4.checkpoint.

Ties: the indexer's scores are sums of rectified products, so exact zeros are common, and if more entries tie than fit
into index_topk the choice is a convention. Ours is the lower index; torch.topk leaves it open. In the tests that let
the indexer choose, Tensor.topk is replaced during transformers' forward (only its indexer calls it) by a stable
descending sort, which keeps equal scores in the order of their indices. If index_topk exceeds the number of entries,
nothing is replaced.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dsv4.config import ModelConfig, YarnScaling
from dsv4.model.transformer import Transformer

from .tiny import deviation, random_ids, random_model, tiny_config

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 131, 255, 257)

# Official part -> transformers' part; the first that occurs in a name is replaced.
PARTS = (
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
    ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
    ("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
    ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
    ("attn.compressor.norm", "self_attn.compressor.kv_norm"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.wo_a", "self_attn.o_a_proj"),
    ("attn.wo_b", "self_attn.o_b_proj"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate", "mlp.gate"),
    ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
)
WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}


def their_weights(model: Transformer) -> dict[str, Tensor]:
    weights, c = model.state_dict(), model.config
    theirs: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in WHOLE:
            theirs[WHOLE[name]] = tensor
        elif not name.startswith("mtp.") and ".experts." not in name:
            old, new = next(pair for pair in PARTS if pair[0] in name)
            theirs["model." + name.replace(old, new)] = tensor
    for layer in range(c.num_hidden_layers):
        w1, w2, w3 = (weights[f"layers.{layer}.ffn.experts.{w}"] for w in ("w1", "w2", "w3"))
        theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), 1)
        theirs[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return theirs


def their_model(model: Transformer) -> nn.Module:
    c = model.config
    same = (
        *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "n_shared_experts"),
        *("num_experts_per_tok", "routed_scaling_factor", "index_n_heads", "index_head_dim", "index_topk"),
        *("num_hash_layers", "sliding_window", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rope_theta"),
        *("compress_rope_theta", "swiglu_limit", "max_position_embeddings", "rms_norm_eps"),
    )
    settings: dict[str, Any] = {name: getattr(c, name) for name in same}
    yarn = c.rope_scaling
    if yarn is not None:
        names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        settings["rope_scaling"] = {"type": "yarn"} | {name: getattr(yarn, name) for name in names}
    else:
        settings["rope_scaling"] = None
    config = transformers.DeepseekV4Config(
        **settings, compress_ratios=list(c.compress_ratios), num_key_value_heads=1, tie_word_embeddings=False
    )
    theirs = transformers.DeepseekV4ForCausalLM(config).eval()
    theirs.load_state_dict(their_weights(model), strict=True)
    return theirs


class TopK(NamedTuple):
    indices: Tensor


def lower_index_first(scores: Tensor, k: int, dim: int = -1) -> TopK:
    order = scores.sort(dim=dim, descending=True, stable=True).indices  # a sort treats -0 and 0 as equal
    return TopK(order.narrow(dim, 0, k))


def higher_index_first(scores: Tensor, k: int, dim: int = -1) -> TopK:
    order = scores.flip(dim).sort(dim=dim, descending=True, stable=True).indices
    return TopK(scores.shape[dim] - 1 - order.narrow(dim, 0, k))


@torch.no_grad()
def compare(
    model: Transformer, lengths: tuple[int, ...], topk: Callable[..., TopK] | None = lower_index_first
) -> dict[int, float]:
    """Deviation by length, batches of 2; topk replaces Tensor.topk during transformers' forward."""
    theirs, apart = their_model(model), {}
    ids = random_ids(model.config, 2, max(lengths), seed=sum(lengths))
    for n in lengths:
        ours = model(ids[:, :n])
        with pytest.MonkeyPatch.context() as patch:
            if topk is not None:
                patch.setattr(Tensor, "topk", topk)
            apart[n] = deviation(ours, theirs(ids[:, :n], use_cache=False).logits)
    return apart


def random_config(seed: int) -> ModelConfig:
    """Another order of layers, other widths, YaRN of several strengths or none."""
    pick = random.Random(seed)
    schedule = [0, 4, 128, pick.choice((0, 4, 128)), pick.choice((4, 128))]
    pick.shuffle(schedule)
    yarn = pick.choice((None, YarnScaling(), YarnScaling(factor=4, original_max_position_embeddings=256)))
    groups = pick.choice((1, 2, 3))
    head_dim = pick.choice((24, 32, 40))
    return tiny_config(
        schedule=schedule,
        num_hash_layers=pick.randrange(4),
        hidden_size=pick.choice((56, 64, 72)),
        num_attention_heads=groups * pick.choice((1, 2)),
        o_groups=groups,
        head_dim=head_dim,
        qk_rope_head_dim=pick.choice((8, 16, head_dim // 2)),
        q_lora_rank=pick.choice((40, 48)),
        index_n_heads=pick.choice((1, 2, 5)),
        index_head_dim=pick.choice((32, 64)),
        index_topk=pick.choice((1, 5, 17)),
        n_routed_experts=pick.choice((4, 7)),
        num_experts_per_tok=pick.choice((1, 2, 3)),
        routed_scaling_factor=pick.choice((1.0, 1.5, 2.5)),
        swiglu_limit=pick.choice((1.0, 10.0)),
        hc_sinkhorn_iters=pick.choice((3, 20)),
        rope_scaling=yarn,
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_configs_give_transformers_logits(seed: int) -> None:
    model = random_model(random_config(seed), seed)
    lengths = tuple(LENGTHS[i] for i in (seed % 4, 4 + seed % 6, 4 + (seed + 3) % 6))
    apart = compare(model, lengths)
    assert max(apart.values()) <= TOLERANCE, apart


@pytest.mark.parametrize("yarn", [None, YarnScaling()])
def test_every_length_gives_transformers_logits(yarn: YarnScaling | None) -> None:
    model = random_model(tiny_config(schedule=(0, 4, 128, 4), index_topk=9, rope_scaling=yarn), seed=21)
    apart = compare(model, LENGTHS)
    assert max(apart.values()) <= TOLERANCE, apart


def test_reading_every_entry_gives_transformers_logits_with_nothing_patched() -> None:
    model = random_model(tiny_config(schedule=(128, 4, 0, 4, 128), index_topk=128), seed=22)
    apart = compare(model, (5, 129, 389), topk=None)
    assert max(apart.values()) <= TOLERANCE, apart


def test_flash_s_first_layers_and_heads_give_transformers_logits() -> None:
    """Flash's proportions: 3 hash layers, 0 0 4 128 4 128, 8 heads per group, rope width an eighth of the head."""
    config = tiny_config(
        schedule=(0, 0, 4, 128, 4, 128),
        num_hash_layers=3,
        num_attention_heads=16,
        head_dim=64,
        qk_rope_head_dim=8,
        index_topk=11,
    )
    apart = compare(random_model(config, seed=23), (131, 260))
    assert max(apart.values()) <= TOLERANCE, apart


def test_the_tie_rule_decides() -> None:
    """With one index head half of the scores are 0: ties to the higher index would give another model."""
    model = random_model(tiny_config(schedule=(4,), num_hash_layers=0, index_n_heads=1, index_topk=3), seed=24)
    assert compare(model, (129,))[129] <= TOLERANCE
    assert compare(model, (129,), higher_index_first)[129] > 0.01
