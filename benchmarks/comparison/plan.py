"""What is measured: the model shapes, the lengths, the rounds, and the targets."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.config import ModelConfig

PEERS = ("dsv4", "transformers")
FOLDERS = {"dsv4": "official", "transformers": "transformers"}  # contender -> folder of its weights

# The shape that the targets were set on: 120.9M parameters, about 29M of them used by a token.
SHAPE = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=8,
    num_hash_layers=3,
    num_attention_heads=8,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=256,
    o_groups=2,
    o_lora_rank=128,
    index_n_heads=8,
    index_head_dim=64,
    index_topk=64,
    n_routed_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
    num_nextn_predict_layers=0,
    routed_scaling_factor=1.5,
)

# Every kind of layer, small enough for a test.
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_hash_layers=1,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=8,  # fewer, and most entries would tie at a score of 0, where contenders may choose differently
    index_head_dim=32,
    index_topk=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    compress_ratios=(0, 4, 128),
    num_nextn_predict_layers=0,
    routed_scaling_factor=1.5,
)


@dataclass(frozen=True)
class Plan:
    """Lengths are tokens. The fresh lengths run in a new process each, so that its peak memory is theirs alone."""

    name: str
    config: ModelConfig
    rounds: int  # of decode and the short prefills
    fresh_rounds: int  # of the prefill at fresh_length
    prompt: int  # what decode continues
    steps: int  # decoded tokens a round
    prefill: tuple[int, ...]  # in the long-lived processes
    fresh_small: int  # a second point of transformers' memory curve
    fresh_length: int
    long_length: int  # dsv4 alone
    agree: int = 290  # prompt of the logits comparison: past the window, and past what the indexer keeps whole
    agree_steps: int = 10


FULL = Plan("full", SHAPE, 5, 3, 128, 64, (512, 2048), 2048, 8192, 65536)
QUICK = Plan("quick", TINY, 1, 1, 20, 4, (64, 130), 64, 260, 520, agree=140, agree_steps=3)


@dataclass(frozen=True)
class Target:
    """A ratio dsv4 / transformers (unit "x"), or a figure of dsv4 alone (bytes), to be reached."""

    measure: str
    tokens: int
    unit: str
    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    Target("decode", 128, "x", 4.0, True),
    Target("prefill", 8192, "x", 10.0, True),
    Target("peak memory", 8192, "x", 0.25, False),
    Target("peak memory", 65536, "bytes", 4e9, False),
)
