"""Post-training: fine-tuning, reinforcement learning and on-policy distillation of a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4.lazy import lazy_names

if TYPE_CHECKING:
    from dsv4.post_training.kl import reverse_kl

__all__ = ["reverse_kl"]

__getattr__, __dir__ = lazy_names("dsv4.post_training", {"reverse_kl": ("dsv4.post_training.kl", "reverse_kl")})
