"""Shapes of a model that training goes on from; needs no torch."""

from __future__ import annotations

from dsv4.analysis.inventory import tensor_inventory
from dsv4.config import ModelConfig


def check_shapes(config: ModelConfig, start: ModelConfig, name: str) -> None:
    """ValueError naming the first tensor that `config` has otherwise than the model `start` in the folder `name`."""
    found, wanted = ({spec.name: spec.shape for spec in tensor_inventory(c, "fp32")} for c in (start, config))
    for tensor in [*wanted, *found]:
        if found.get(tensor) != wanted.get(tensor):
            shapes = " and ".join(str(list(s[tensor])) if tensor in s else "absent" for s in (wanted, found))
            raise ValueError(
                f"the keys of the model change its tensors: {tensor} would be and is, in {name}, {shapes}; allowed "
                "with a start: keys that leave every tensor its shape"
            )
