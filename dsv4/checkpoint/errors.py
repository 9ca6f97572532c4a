"""Error of a model folder that cannot be read or written."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A model folder cannot be read or written: names the file, the tensor, the expected and the found content."""

    def __init__(self, file: str | Path, expected: str, found: str, tensor: str | None = None) -> None:
        self.file, self.tensor, self.expected, self.found = Path(file), tensor, expected, found
        place = f"{file}: tensor {tensor!r}" if tensor is not None else str(file)
        super().__init__(f"{place}: expected {expected}; found {found}")
