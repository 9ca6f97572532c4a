"""A small random model with the embedded tokenizer, and problems whose rewards it can learn in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepseek_recipe import Conversation, UserMessage

from dsv4.config import ModelConfig, nano_path
from dsv4.model.transformer import Transformer
from dsv4.post_training.served_policy import ServedPolicy
from dsv4.training.optim import MuonAdamW


def small_policy(**changes: Any) -> tuple[ServedPolicy, MuonAdamW]:
    """Always the same weights."""
    config = replace(
        ModelConfig.from_pretrained(nano_path()), hidden_size=32, num_hidden_layers=3, num_hash_layers=1,
        num_attention_heads=2, head_dim=64, q_lora_rank=16, o_groups=2, o_lora_rank=16, index_n_heads=2, index_topk=8,
        n_routed_experts=4, moe_intermediate_size=32, compress_ratios=(0, 4, 128, 0), **changes,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(2))
    optimizer = MuonAdamW(model.requires_grad_(), config)
    return ServedPolicy(model, nano_path(), max_num_seqs=16, max_model_len=256), optimizer


@dataclass(frozen=True)
class TextProblem:
    """A number to answer; `judged` gives the reward of the text."""

    number: int
    judged: Callable[[str], float]
    domain: str = "letters"
    thinking: bool = False

    @property
    def key(self) -> str:
        return str(self.number)

    def prompt(self) -> Conversation:
        return Conversation([UserMessage(f"Say {self.number % 5}")], thinking_mode=False)

    def reward(self, answer: str) -> float:
        return self.judged(answer)


@dataclass(frozen=True)
class TextProblems:
    judged: Callable[[str], float]

    def problem(self, number: int, /) -> TextProblem:
        return TextProblem(number, self.judged)


def has_f(text: str) -> float:
    """Reward that the random model gets for about a third of its answers."""
    return float("f" in text)
