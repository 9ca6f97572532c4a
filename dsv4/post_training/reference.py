"""The reference policy that GRPO's KL is to; it may take over the policy's weights each so many steps, as R1's did."""

from __future__ import annotations

from pathlib import Path

from dsv4.model.transformer import Transformer
from dsv4.post_training.frozen_models import PolicyCopy
from dsv4.post_training.served_policy import ServedPolicy


class ReferencePolicy:
    """The model given, and with `every` above 0 the policy as the last step began whose number is a multiple of that.

    `run_dir` keeps the weights of that policy, which cannot be had again; `step`: at which the run goes on. StateError
    if they are missing.
    """

    def __init__(self, given: Transformer, policy: ServedPolicy, every: int, run_dir: Path, step: int) -> None:
        self.model = given
        self._policy, self._every, self._run_dir = policy, every, run_dir
        self._copy: PolicyCopy | None = None
        self._taken = (step - 1) // every * every if every and step else 0  # step that it is of; 0: the model given
        self._is_saved = True
        if self._taken:
            self._take_over().load(self._path)

    def begin(self, step: int) -> None:
        """Take over the policy's weights before step `step`, if it is one for that."""
        if self._every and step and step % self._every == 0:
            self._take_over()
            self._taken, self._is_saved = step, False

    def save(self) -> None:
        """Write the weights, if no saved state has had them; call before the state is saved."""
        if self._copy is not None and not self._is_saved:
            self._copy.save(self._path)
            self._is_saved = True

    def clear(self) -> None:
        """Remove the weights of earlier states; call when the state is saved."""
        for path in self._run_dir.glob("reference-*.safetensors"):
            if path != self._path:
                path.unlink()

    @property
    def _path(self) -> Path:
        return self._run_dir / f"reference-{self._taken}.safetensors"

    def _take_over(self) -> PolicyCopy:
        """The policy's weights of now; the first ones in place of the model given, which is let go."""
        if self._copy is not None:
            self._copy.follow(self._policy.model)
        else:
            self._copy = PolicyCopy(self._policy.model, self._policy.quantized)
            self.model = self._copy.model
        return self._copy
