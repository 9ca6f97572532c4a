"""Main layers of each stage of a pipeline, balanced by cost; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from dsv4.config import ModelConfig


def balance_layers(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Layers per stage, at least one each, such that the costliest stage costs as little as it can.

    costs: of each layer; first, last: of what the first and the last stage have besides (embedding; head and MTP).
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers in {stages} stages; allowed: 1 to {layers}")
    before = [0.0, *accumulate(costs)]
    # least[n][i]: (cost of the costliest of the first n stages when they hold i layers, layers of the last of them)
    least: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(stages):
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        row: dict[int, tuple[float, int]] = {}
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            options = (
                (max(least[stage][begin][0], before[end] - before[begin] + extra), end - begin)
                for begin in least[stage]
                if begin < end
            )
            row[end] = min(options)
        least.append(row)
    sizes: list[int] = []
    end = layers
    for stage in range(stages, 0, -1):
        sizes.append(least[stage][end][1])
        end -= sizes[-1]
    return sizes[::-1]


def layer_costs(config: ModelConfig) -> tuple[list[float], float]:
    """(cost of each main layer, of what the last stage has besides), in multiply-adds per token outside attention.

    The embedding costs nothing, the head its matrix, the MTP block a layer, two projections, and the head again.
    """
    d, width = config.hidden_size, config.moe_intermediate_size
    heads = config.num_attention_heads * config.head_dim
    layer = 3.0 * d * width * (config.num_experts_per_tok + config.n_shared_experts)
    layer += config.q_lora_rank * (d + heads) + d * config.head_dim + config.o_lora_rank * (heads + d * config.o_groups)
    head = float(d * config.vocab_size)
    mtp = config.num_nextn_predict_layers * (layer + 2.0 * config.hc_mult * d * d + head)
    return [layer] * config.num_hidden_layers, head + mtp


@lru_cache(maxsize=256)
def stage_sizes(config: ModelConfig, stages: int) -> tuple[int, ...]:
    """Main layers of each of `stages` stages of about equal cost."""
    costs, last = layer_costs(config)
    return tuple(balance_layers(costs, stages, last=last))
