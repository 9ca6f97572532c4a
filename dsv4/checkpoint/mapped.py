"""The files that a model's weights are views of, or were read from: whether they are still what they were."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dsv4.checkpoint.errors import CheckpointError
from dsv4.checkpoint.folder import Checkpoint
from dsv4.kernels import backends
from dsv4.kernels.stored import StoredWeight

# Attributes of a loaded model, where it has such: MappedFiles and LoadedScales.
MAPPED_FILES = "mapped_files"
LOADED_SCALES = "checkpoint_scales"


class _Identity(NamedTuple):
    """What of a file changes when it is written to (the last two) or another takes its name (the first two)."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


class MappedFiles:
    """The files of an opened folder, as they are now, all mapped. As long as this lives the native kernels watch them.

    Should the process end for want of a file's bytes (SIGBUS), they write a last line to stderr that names the file; on
    Linux, and not where the reference kernels run: those read a file only while it is loaded.

    A file that another one replaced by its name, or that was deleted, is as before to whoever has it mapped. One that
    was written to is not, and one cut short ends the process when its lost end is read (SIGBUS).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        # A link can be turned to another file, of which nothing is mapped.
        self._identities = {file.resolve(): _identify(file) for file in checkpoint.map_files()}
        self.ranges = _mapped_ranges(set(self._identities))
        _watched.add(self)
        weakref.finalize(self, _tell_kernels)
        _tell_kernels()

    def change(self) -> str | None:
        """What has happened to the first file that is no longer as it was opened, None where all are."""
        for file, opened in self._identities.items():
            try:
                now = _identify(file)
            except OSError:
                continue  # deleted, or its folder: the mapped file lives on
            if now[:2] != opened[:2]:
                continue
            if now.num_bytes < opened.num_bytes:
                return f"{file} was cut from {opened.num_bytes} to {now.num_bytes} bytes since it was opened"
            if now != opened:
                return f"{file} was written to since it was opened"
        return None

    def check(self) -> None:
        """CheckpointError where one is no longer as it was opened."""
        if (change := self.change()) is not None:
            raise CheckpointError(self._folder, "files that nobody writes to while they are read", change)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFiles:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # pickled weights carry their bytes


class LoadedScales:
    """The scales that the weights of a model were stored with: views of the files, for a save that may never come."""

    def __init__(self, find: Callable[[str], Tensor | None], files: MappedFiles) -> None:
        """find: weight name -> its scales, None without. What it refers to keeps the files on the disk."""
        self._find, self._files = find, files

    def get(self, name: str) -> Tensor | None:
        """The scales of an official weight; None where it had none or its file has been written to since."""
        return None if self._files.change() is not None else self._find(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedScales:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # without scales: another process has not opened the files


def mapped_files(model: object) -> MappedFiles | None:
    """The files that weights of a loaded model are views of, None where there are none (any more)."""
    files: MappedFiles | None = getattr(model, MAPPED_FILES, None)
    if files is None or not isinstance(model, nn.Module):
        return None
    return files if any(isinstance(parameter, StoredWeight) for parameter in model.parameters()) else None


_watched: weakref.WeakSet[MappedFiles] = weakref.WeakSet()


def _tell_kernels() -> None:
    kernels = backends.native_module()
    if kernels is None:
        return
    line = (
        "dsv4: the process ends (SIGBUS): {} is mapped into it and can no longer be read, most often because the file "
        "was cut short or overwritten. Put other weights in its place by renaming.\n"
    )
    ranges = [(first, last, line.format(file)) for files in _watched for first, last, file in files.ranges]
    kernels.watch_bus_errors(ranges)


def _mapped_ranges(files: set[Path]) -> list[tuple[int, int, Path]]:
    """First address and the one after the last of each mapping of these files; none where the system does not say."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    found: list[tuple[int, int, Path]] = []
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.startswith("/") and (file := Path(name)) in files:
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append((first, last, file))
    return found


def _identify(file: Path) -> _Identity:
    status = file.stat()
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
