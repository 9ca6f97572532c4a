"""Models that a run computes with and does not train: teachers, the reference policy, copies of the policy itself.

They have the values that the policy is served with: a KL to the same weights is then exactly 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv4.checkpoint import load_model, stored_format
from dsv4.checkpoint.atomic import new_file
from dsv4.kernels.backends import stored_as_widened
from dsv4.model.transformer import Transformer
from dsv4.training.qat import round_weights
from dsv4.training.state import StateError

STORED = "official"  # the format whose values a quantized policy computes with


def load_frozen(
    folder: Path, quantized: bool, numerics: str = "float", device: torch.device | str = "cpu"
) -> Transformer:
    """The model in `folder`, frozen. `quantized`: with the values that the official layout would store of it.

    What is stored so stays in its files, unless products with it then have other bits than the policy's, whose weights
    are in fp32.
    """
    if not quantized or stored_format(folder) == STORED:
        weights = None if stored_as_widened() else "widened"
        return load_model(folder, device=device, numerics=numerics, weights=weights)
    model = load_model(folder, device=device, numerics=numerics, weights="widened").requires_grad_()
    round_weights(model)
    return model.freeze()


class PolicyCopy:
    """A frozen copy of a policy's weights, in their stored values if `quantized`, which a run saves beside its state.

    `model` is the same object after each change.
    """

    def __init__(self, policy: Transformer, quantized: bool) -> None:
        with torch.device(policy.device):
            self.model = Transformer(policy.config, policy.numerics)
        self._quantized = quantized
        self.follow(policy)

    @torch.no_grad()
    def follow(self, policy: Transformer) -> None:
        """Take over the policy's weights of now."""
        self.model.load_state_dict(policy.state_dict())
        if self._quantized:
            round_weights(self.model)
        self.model.freeze()

    def save(self, path: Path) -> None:
        """Write the weights, of which a resumed run goes on."""
        with new_file(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, temporary)

    def load(self, path: Path) -> None:
        """Take the weights of a file that `save` wrote. StateError if there is none."""
        if not path.is_file():
            raise StateError(f"{path} is missing: the run was saved with these weights of an earlier policy")
        self.model.load_state_dict(load_file(path))
        self.model.freeze()
