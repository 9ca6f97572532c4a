"""Published weights: a file per version in a folder, whole or absent, so that workers read them at any time."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dsv4.checkpoint.atomic import clear_folder, new_file
from dsv4.model.transformer import Transformer

_NAME = re.compile(r"(\d+)\.safetensors")


class PublishedWeights:
    """The folder that a learner publishes to and its workers read from; only the latest version stays.

    A file has the fp32 masters. What they are served as, stored values or themselves, is computed from them by the same
    code in every process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def publish(self, version: int, model: Transformer) -> None:
        """Write the weights of `version`, then remove all others: earlier ones, and later ones of a run that was
        taken back to a saved step. DiskFullError if there is no room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_folder(self.folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        with new_file(self._path(version), sum(tensor.nbytes for tensor in tensors.values())) as temporary:
            save_file(tensors, temporary)
        for other in self._versions() - {version}:
            self._path(other).unlink(missing_ok=True)

    def keep(self, version: int) -> None:
        """Remove weights later than `version`: those of a run that is taken back to a saved step."""
        for later in (other for other in self._versions() if other > version):
            self._path(later).unlink(missing_ok=True)

    def latest(self) -> int | None:
        """The latest version; None before the first."""
        return max(self._versions(), default=None)

    @torch.no_grad()
    def load(self, version: int, model: Transformer) -> bool:
        """Write a version into a model that takes gradients; False, with nothing changed, if it has just gone."""
        try:
            tensors = load_file(self._path(version))
        except (FileNotFoundError, SafetensorError):
            if self._path(version).exists():
                raise
            return False
        model.load_state_dict(tensors)
        return True

    def _path(self, version: int) -> Path:
        return self.folder / f"{version}.safetensors"

    def _versions(self) -> set[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return set()
        return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
