"""Streams of an episode: what its turns and tokens have, appended to files turn by turn and mapped when it is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.checkpoint.atomic import space_in_words
from dsv4.model.choices import Choices

TYPES = {
    "document": np.int32,  # [T]: prompt, sampled tokens and results, end to end
    "spans": np.int64,  # [turns, 2]: start and stop in the document of what a turn has sampled
    "log_probabilities": np.float32,  # [n]: of the sampled tokens
    "masks": np.uint8,  # [n, bytes]: their sampling masks
    "experts": np.int16,  # [T - 1, ...], entries too: choices of the document's tokens but the last
    "entries": np.int32,
}


class EpisodeStreams:
    """Arrays of one episode, each a file of `folder`. In memory are their shapes alone, however long they grow.

    `lengths`: rows of each array; they remain after `release`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lengths = dict.fromkeys(TYPES, 0)
        self._rows: dict[str, tuple[int, ...]] = {}  # shape of a row
        folder.mkdir()

    def append(self, name: str, rows: Sequence[Any] | np.ndarray) -> None:
        """Put rows behind those of an array. DiskFullError if there is no room."""
        values = np.asarray(rows, dtype=TYPES[name])
        if not len(values):
            return
        path = self._path(name)
        with space_in_words(path, values.nbytes), path.open("ab") as file:
            file.write(np.ascontiguousarray(values).data)
        self._rows[name] = values.shape[1:]
        self.lengths[name] += len(values)

    def append_masks(self, masks: Sequence[bytes]) -> None:
        """Put sampling masks, a bit per token of the vocabulary, behind the others."""
        if masks:
            self.append("masks", np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1))

    def append_choices(self, choices: Choices) -> None:
        """Take in the choices of the document's tokens from the first on; those that are known stay."""
        for name, part in (("experts", choices.experts), ("entries", choices.entries)):
            if part is not None:
                self.append(name, part[self.lengths[name] :])

    def read(self, name: str) -> np.ndarray:
        """An array, mapped from its file: read as it is used, and not to be written."""
        shape = (self.lengths[name], *self._rows.get(name, ()))
        if not math.prod(shape):
            return np.empty(shape, TYPES[name])
        return np.asarray(np.memmap(self._path(name), TYPES[name], "r", shape=shape))

    def release(self) -> None:
        """Remove the files; again is allowed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"
