"""Table of scenarios: weights, contenders, lengths. Light to import, for --help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dsv4.config import ModelConfig, nano_path

Weights = Literal["fp32", "official", "codes", "nano"]

# Every kind of layer: 120.9M parameters, about 29M of them used per token.
SLICE = ModelConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_hash_layers=3, num_nextn_predict_layers=0,
    num_attention_heads=8, head_dim=128, qk_rope_head_dim=64, q_lora_rank=256, o_groups=2, o_lora_rank=128,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128), index_n_heads=8, index_head_dim=64, index_topk=64,
    n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, routed_scaling_factor=1.5,
)  # fmt: skip
# The same kinds of layers, more of them and wider: 554M parameters, about 145M of them used per token.
LARGE = replace(
    SLICE, hidden_size=1024, num_hidden_layers=10, compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128, 4, 128),
    num_attention_heads=16, q_lora_rank=512, o_groups=4, moe_intermediate_size=512, num_experts_per_tok=6,
)  # fmt: skip
# The same kinds of layers, small enough for a test. With fewer index heads most entries would tie at a score of 0.
TINY = replace(
    SLICE, vocab_size=96, hidden_size=64, num_hidden_layers=3, num_hash_layers=1,
    num_attention_heads=4, head_dim=32, qk_rope_head_dim=16, q_lora_rank=32, o_lora_rank=16,
    compress_ratios=(0, 4, 128), index_head_dim=32, index_topk=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
# One CSA and one HCA layer with Flash's widths: 7.2 GB, of which a token reads about 480 MB.
FLASH_WIDTH = replace(
    ModelConfig.preset("flash"), vocab_size=1024, num_hidden_layers=2, num_hash_layers=0, num_nextn_predict_layers=0,
    compress_ratios=(4, 128),
)  # fmt: skip
NANO = ModelConfig.from_pretrained(nano_path())


@dataclass(frozen=True)
class Scenario:
    """One model, its contenders and their measures. Lengths are tokens.

    weights: random values as fp32 or in the official layout, random codes (for models too large in fp32), or nano's.
    peers: "dsv4", "dsv4 shipped", "transformers", "llama.cpp", each with its longest prefill and decode if longer ones
    would take too much time or memory. The logits of dsv4 and transformers must agree.
    """

    name: str
    about: str
    weights: Weights
    config: ModelConfig
    peers: Mapping[str, Mapping[str, int]]
    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()  # depths at which decoding starts
    marks: tuple[int, ...] = ()  # instead of prefill and decode: lengths at which one long prompt is measured
    rounds: int = 3
    turns: int = 0  # extra rounds of dsv4's decode, so that depths are seconds apart; in the other rounds minutes
    steps: int = 64  # decoded tokens per sample
    budget_s: float = 150  # per contender and measure
    agree: tuple[int, int] = (290, 10)  # prompt and steps of the logits comparison: past window and index_topk
    ceilings: tuple[int, int] = (256, 2048)  # megabytes copied, rows and columns of the matrix product

    @property
    def layout(self) -> Literal["fp32", "official"]:
        return "fp32" if self.weights == "fp32" else "official"

    def measures(self) -> list[tuple[str, int]]:
        """(measure, tokens), lengths ascending, so that a memory peak belongs to its length."""
        return [*(("prefill", n) for n in self.prefill), *(("decode", n) for n in self.decode)]

    def asks(self, contender: str, measure: str, tokens: int) -> bool:
        """True if a contender is asked for this figure."""
        return tokens <= self.peers[contender.split()[0]].get(measure, tokens)


_PEERS = {"dsv4": {}, "transformers": {"prefill": 8192, "decode": 0}, "llama.cpp": {"decode": 16384}}
_PREFILL, _DEPTHS = (512, 2048, 8192, 32768), (0, 1024, 16384, 131072)
_TABLE = (
    Scenario(
        "slice",
        "120.9M parameters of every kind of layer, random, FP4 and FP8; with llama.cpp and transformers",
        "official", SLICE, _PEERS, prefill=_PREFILL, decode=_DEPTHS, turns=15,
    ),
    Scenario(
        "nano",
        "the embedded model; with llama.cpp and transformers",
        "nano", NANO, _PEERS, prefill=_PREFILL, decode=_DEPTHS, turns=15,
    ),
    Scenario(
        "fp32",
        "slice's shape in fp32; with transformers",
        "fp32", SLICE, {"dsv4": {}, "transformers": {"prefill": 8192}}, prefill=(512, 2048, 8192, 65536), decode=(128,),
    ),
    Scenario(
        "flash-width",
        "two layers of V4-Flash's widths, random, 7.2 GB; beside what the machine can do",
        "codes", FLASH_WIDTH, {"dsv4": {}, "dsv4 shipped": {}}, prefill=(1024,), decode=(1024,),
    ),
    Scenario(
        "million",
        "1,048,576 tokens through nano; minutes",
        "nano", NANO, {"dsv4": {}}, marks=tuple(2**power for power in range(10, 21)), steps=32,
    ),
)  # fmt: skip
SCENARIOS = {scenario.name: scenario for scenario in _TABLE}
_LARGE = Scenario("large", "of every kind of layer, random codes, FP4 and FP8", "codes", LARGE, {"dsv4": {}})
SERVED = {name: SCENARIOS[name] for name in ("nano", "slice")} | {"large": _LARGE}  # by `dsv4 bench serving`


def quick(scenario: Scenario) -> Scenario:
    """The scenario at sizes that run in seconds."""
    shorter = {"prefill": 64, "decode": 40}
    return replace(
        scenario,
        config=scenario.config if scenario.weights == "nano" else TINY,
        peers={
            peer: {measure: min(shorter[measure], most) for measure, most in longest.items()}
            for peer, longest in scenario.peers.items()
        },
        prefill=(64, 130)[: len(scenario.prefill)],
        decode=(0, 40, 260)[: len(scenario.decode)],
        marks=(128, 256) if scenario.marks else (),
        rounds=1,
        turns=min(scenario.turns, 2),
        steps=4,
        agree=(140, 3),
        ceilings=(8, 256),
    )
