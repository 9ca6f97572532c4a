"""Parameter counts by component. Scales, the router's correction bias and the hash tables are not parameters.

Source: the published sizes. "284B" is Flash without its MTP block; "13B" and "49B" leave out the embedding lookup.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.analysis.inventory import tensor_inventory
from dsv4.config import ModelConfig

COMPONENTS = (
    *("embed", "head", "norms", "mhc", "attention", "compressors", "indexers"),
    *("router", "routed_experts", "shared_experts", "mtp_projections"),
)


@dataclass(frozen=True)
class ParameterCount:
    main: dict[str, int]  # by component, without the MTP block
    mtp: dict[str, int]  # the MTP block's own; embedding and head are shared with the main model
    main_idle: int  # in the main model's routed experts that a token does not use
    mtp_idle: int
    router_bias: int  # main model, one per routed expert of each score-routed layer
    tid2eid: int  # entries of the hash tables

    @property
    def total(self) -> int:
        return sum(self.main.values())

    @property
    def total_with_mtp(self) -> int:
        return self.total + sum(self.mtp.values())

    @property
    def active_with_embed(self) -> int:
        """Main-model parameters that one token uses, the embedding table counted whole."""
        return self.total - self.main_idle

    @property
    def active(self) -> int:
        """`active_with_embed` less the embedding, a lookup and no product. The head is counted."""
        return self.active_with_embed - self.main["embed"]

    @property
    def mtp_active(self) -> int:
        """Parameters that one draft step adds to `active`."""
        return sum(self.mtp.values()) - self.mtp_idle


def count_parameters(config: ModelConfig) -> ParameterCount:
    main = dict.fromkeys(COMPONENTS, 0)
    mtp = dict.fromkeys(COMPONENTS, 0)
    router_bias = tid2eid = 0
    for spec in tensor_inventory(config, "bf16"):
        is_mtp = spec.name.startswith("mtp.")
        if spec.component == "tid2eid":
            tid2eid += spec.shape[0] * spec.shape[1]
        elif spec.component == "router_bias":
            router_bias += 0 if is_mtp else spec.shape[0]
        else:
            (mtp if is_mtp else main)[spec.component] += spec.parameters
    used, of = config.num_experts_per_tok, config.n_routed_experts
    return ParameterCount(
        main=main,
        mtp=mtp,
        main_idle=main["routed_experts"] // of * (of - used),
        mtp_idle=mtp["routed_experts"] // of * (of - used),
        router_bias=router_bias,
        tid2eid=tid2eid,
    )
